//! Folders that are opened again, damaged, full, and shared.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use super::{
    file::{FIXED_BYTES, Header, MAGIC, PARTIAL, VERSION, header, read_header},
    *,
};

const SETTINGS: &str = "a model; q4_0, lazy";
const OTHERS: &str = "a model; f16";
const PLENTY: u64 = 1 << 30;

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn open(dir: &Path) -> Parking {
    Parking::open(dir, PLENTY, SETTINGS).unwrap()
}

fn state_of(tokens: &[i32]) -> Vec<u8> {
    tokens.iter().flat_map(|token| token.wrapping_mul(77).to_le_bytes()).cycle().take(1000).collect()
}

/// Parks the tokens with their state, on the disk when it returns.
fn park(parking: &Parking, tokens: &[i32]) {
    assert_eq!(parking.store(tokens, state_of(tokens)), Stored::Queued);
    parking.flush();
}

fn restored(parking: &Parking, tokens: &[i32]) -> Option<Vec<u8>> {
    parking.find(tokens).map(|parked| parking.load(&parked).unwrap())
}

fn files(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter(|name| name != "lock").collect();
    names.sort();
    names
}

fn only_file(dir: &Path) -> PathBuf {
    match &files(dir)[..] {
        [name] => dir.join(name),
        names => panic!("{names:?}"),
    }
}

fn set_age(path: &Path, seconds: u64) {
    let then = SystemTime::now() - Duration::from_secs(seconds);
    File::options().write(true).open(path).unwrap().set_modified(then).unwrap();
}

#[test]
fn what_is_parked_is_given_back_before_and_after_a_restart() {
    let dir = folder();
    let parking = open(dir.path());
    assert_eq!(parking.store(&[1, 2, 3], state_of(&[1, 2, 3])), Stored::Queued);
    assert_eq!(restored(&parking, &[1, 2, 3]), Some(state_of(&[1, 2, 3])), "while it waits");
    parking.flush();
    assert_eq!(restored(&parking, &[1, 2, 3, 4]), Some(state_of(&[1, 2, 3])), "written");
    assert_eq!(parking.store(&[1, 2, 3], state_of(&[1, 2, 3])), Stored::Already);
    drop(parking);

    let parking = open(dir.path());
    assert_eq!(parking.notices(), []);
    assert_eq!(restored(&parking, &[1, 2, 3]), Some(state_of(&[1, 2, 3])));
    let length = fs::metadata(only_file(dir.path())).unwrap().len();
    let stats = parking.stats();
    assert_eq!((stats.entries, stats.bytes, stats.restored, stats.max_bytes), (1, length, 1, PLENTY));
}

#[test]
fn dropping_writes_what_waits() {
    let dir = folder();
    let parking = open(dir.path());
    assert_eq!(parking.store(&[1, 2], state_of(&[1, 2])), Stored::Queued);
    assert_eq!(parking.store(&[3], state_of(&[3])), Stored::Queued);
    drop(parking);
    assert_eq!(open(dir.path()).stats().entries, 2);
}

#[test]
fn the_longest_that_fits_is_found() {
    let dir = folder();
    let parking = open(dir.path());
    for tokens in [&[1, 2][..], &[1, 2, 3, 4], &[1, 2, 3, 4, 5, 6], &[9]] {
        park(&parking, tokens);
    }
    let found = |parked: Option<Parked>| parked.map(|parked| (parked.n_tokens, parked.n_common));
    assert_eq!(found(parking.find(&[1, 2, 3, 4, 5])), Some((4, 4)));
    assert_eq!(found(parking.find(&[1, 2, 3, 4])), Some((4, 4)));
    assert_eq!(found(parking.find(&[1, 2, 3])), Some((2, 2)));
    assert_eq!(found(parking.find(&[1])), None);
    assert_eq!(found(parking.find(&[2, 1])), None);
    assert_eq!(found(parking.find(&[])), None);
    assert_eq!(found(parking.find_common(&[1, 2, 3, 4, 5])), Some((6, 5)));
    assert_eq!(found(parking.find_common(&[1, 2, 3])), Some((4, 3)), "of those with as much in common the shortest");
    assert_eq!(found(parking.find_common(&[1, 7])), Some((2, 1)));
    assert_eq!(found(parking.find_common(&[7])), None);
}

#[test]
fn files_cut_short_anywhere_are_removed_and_never_restored() {
    let dir = folder();
    let tokens = [5, 6, 7];
    park(&open(dir.path()), &tokens);
    let path = only_file(dir.path());
    let whole = fs::read(&path).unwrap();
    let state_at = FIXED_BYTES + SETTINGS.len() + 4 * tokens.len();
    assert_eq!(whole.len(), state_at + 1000);
    for length in (0..=state_at + 1).chain([state_at + 500, whole.len() - 1]) {
        fs::write(&path, &whole[..length]).unwrap();
        let parking = open(dir.path());
        assert_eq!(parking.find_common(&tokens), None, "{length}");
        let notices = parking.notices();
        assert!(matches!(&notices[..], [Notice::Damaged { .. }]), "{length}: {notices:?}");
        assert_eq!((parking.stats().dropped, files(dir.path())), (1, vec![]), "{length}");
    }
    fs::write(&path, [&whole[..], b"x"].concat()).unwrap();
    assert_eq!(open(dir.path()).stats().entries, 0, "too long");
}

#[test]
fn a_write_that_was_killed_leaves_nothing() {
    let dir = folder();
    park(&open(dir.path()), &[1]);
    let path = only_file(dir.path());
    let whole = fs::read(&path).unwrap();
    let name = path.file_name().unwrap().to_str().unwrap().replace(PARKED, PARTIAL);
    fs::remove_file(path).unwrap();
    for length in [0, 1, FIXED_BYTES, whole.len() / 2, whole.len()] {
        fs::write(dir.path().join(&name), &whole[..length]).unwrap();
        let parking = open(dir.path());
        assert_eq!(parking.notices(), [Notice::Unfinished { name: name.clone() }]);
        assert_eq!((parking.stats().entries, files(dir.path())), (0, vec![]));
    }
    let parking = open(dir.path());
    park(&parking, &[1]);
    assert_eq!(restored(&parking, &[1]), Some(state_of(&[1])));
}

#[test]
fn no_changed_byte_is_ever_restored() {
    let dir = folder();
    let tokens = [5, 6, 7];
    park(&open(dir.path()), &tokens);
    let path = only_file(dir.path());
    let whole = fs::read(&path).unwrap();
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        fs::write(&path, bytes).unwrap();
        let parking = open(dir.path());
        if let Some(parked) = parking.find(&tokens) {
            // A state is looked at when it is wanted.
            let error = parking.load(&parked).unwrap_err();
            assert!(matches!(error, ParkingError::Damaged { .. }), "{at}: {error}");
            assert_eq!(parking.find(&tokens), None, "{at}");
            assert!(matches!(parking.load(&parked), Err(ParkingError::Gone)), "{at}");
        }
        let stats = parking.stats();
        if (8..12).contains(&at) {
            assert_eq!((stats.entries, stats.others), (0, 1), "{at}: another version");
        } else {
            assert_eq!((stats.dropped, files(dir.path())), (1, vec![]), "{at}");
            assert!(matches!(&parking.notices()[..], [Notice::Damaged { .. }]), "{at}");
        }
    }
}

#[test]
fn a_file_damaged_while_we_run_is_not_restored() {
    let dir = folder();
    let parking = open(dir.path());
    park(&parking, &[1, 2]);
    park(&parking, &[3, 4]);
    let one = dir.path().join(Key::new(SETTINGS, &[1, 2]).file(PARKED));
    let other = dir.path().join(Key::new(SETTINGS, &[3, 4]).file(PARKED));
    fs::copy(&one, &other).unwrap();
    let parked = parking.find(&[3, 4]).unwrap();
    assert!(matches!(parking.load(&parked), Err(ParkingError::Damaged { .. })));
    fs::remove_file(one).unwrap();
    let parked = parking.find(&[1, 2]).unwrap();
    assert!(matches!(parking.load(&parked), Err(ParkingError::Gone)));
    assert_eq!((parking.stats().entries, parking.stats().bytes), (0, 0));
    park(&parking, &[1, 2]);
    assert_eq!(restored(&parking, &[1, 2]), Some(state_of(&[1, 2])));
}

#[test]
fn no_header_makes_us_panic_or_allocate_much() {
    let length = 4096;
    let mut good = header(SETTINGS, &[1, 2, 3], &[0; 100]);
    good.resize(length, 0);
    for lengths in [[u64::MAX; 3], [0, u64::MAX / 4, 0], [0, 1 << 62, 64], [4032, 0, 0], [0, 0, u64::MAX - 60]] {
        let mut bytes = good.clone();
        bytes[12..16].copy_from_slice(&(lengths[0] as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&lengths[1].to_le_bytes());
        bytes[24..32].copy_from_slice(&lengths[2].to_le_bytes());
        assert!(matches!(read_header(&bytes[..], length as u64), Err(Unreadable::Damaged(_))), "{lengths:?}");
    }
}

proptest::proptest! {
    #[test]
    fn no_bytes_make_us_panic(mut bytes in proptest::collection::vec(0_u8.., 0..200), magic: bool) {
        if magic && bytes.len() >= 12 {
            bytes[..8].copy_from_slice(&MAGIC);
            bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        }
        let read = read_header(&bytes[..], bytes.len() as u64);
        let accepted = matches!(read, Ok(Header::Ours { .. }));
        proptest::prop_assert!(!accepted);
    }
}

#[test]
fn files_of_other_settings_are_left_and_make_room_in_turn() {
    let dir = folder();
    let theirs = Parking::open(dir.path(), PLENTY, OTHERS).unwrap();
    park(&theirs, &[1, 2]);
    drop(theirs);
    set_age(&only_file(dir.path()), 60);

    let parking = open(dir.path());
    assert_eq!(parking.find_common(&[1, 2]), None);
    let stats = parking.stats();
    assert_eq!((stats.entries, stats.others), (0, 1));
    assert_eq!(parking.notices(), [Notice::Others { entries: 1, bytes: stats.others_bytes }]);
    park(&parking, &[1, 2]);
    drop(parking);

    let theirs = Parking::open(dir.path(), PLENTY, OTHERS).unwrap();
    assert_eq!(restored(&theirs, &[1, 2]), Some(state_of(&[1, 2])));
    drop(theirs);
    set_age(&dir.path().join(Key::new(OTHERS, &[1, 2]).file(PARKED)), 60);
    let parking = Parking::open(dir.path(), 2500, SETTINGS).unwrap();
    park(&parking, &[3]);
    let stats = parking.stats();
    assert_eq!((stats.entries, stats.others, stats.evicted), (2, 0, 1));
}

#[test]
fn a_file_of_another_name_is_damaged() {
    let dir = folder();
    park(&open(dir.path()), &[1]);
    let path = only_file(dir.path());
    fs::rename(&path, dir.path().join(Key(7).file(PARKED))).unwrap();
    let parking = open(dir.path());
    assert_eq!((parking.stats().entries, parking.stats().dropped), (0, 1));
}

#[test]
fn the_longest_unused_make_room() {
    let dir = folder();
    // Three fit.
    let max_bytes = 3 * file_bytes(SETTINGS.len(), 1, 1000).unwrap();
    let parking = Parking::open(dir.path(), max_bytes, SETTINGS).unwrap();
    for token in 1..=3 {
        park(&parking, &[token]);
    }
    assert!(restored(&parking, &[1]).is_some());
    park(&parking, &[4]);
    let there = |parking: &Parking| (1..=5).filter(|&token| parking.find(&[token]).is_some()).collect::<Vec<_>>();
    assert_eq!(there(&parking), [1, 3, 4]);
    assert_eq!(parking.store(&[3], state_of(&[3])), Stored::Already);
    park(&parking, &[5]);
    assert_eq!(there(&parking), [3, 4, 5]);
    assert_eq!((parking.stats().bytes, parking.stats().evicted), (max_bytes, 2));
    assert_eq!(files(dir.path()).len(), 3);
    drop(parking);

    // The order outlives us.
    for (token, seconds) in [(3, 10), (4, 30), (5, 20)] {
        set_age(&dir.path().join(Key::new(SETTINGS, &[token]).file(PARKED)), seconds);
    }
    let parking = Parking::open(dir.path(), max_bytes - 1, SETTINGS).unwrap();
    assert_eq!(there(&parking), [3, 5]);
    assert!(matches!(parking.notices()[..], [Notice::OverLimit { entries: 1, .. }]));
    assert!(restored(&parking, &[5]).is_some());
    assert_eq!(parking.store(&[3], state_of(&[3])), Stored::Already);
    drop(parking);
    let parking = Parking::open(dir.path(), max_bytes / 3, SETTINGS).unwrap();
    assert_eq!(there(&parking), [3]);
}

#[test]
fn what_never_fits_is_refused() {
    let dir = folder();
    let parking = Parking::open(dir.path(), 1000, SETTINGS).unwrap();
    assert_eq!(parking.store(&[1], state_of(&[1])), Stored::TooLarge);
    assert_eq!((parking.find(&[1]), files(dir.path())), (None, vec![]));
    assert!(matches!(
        Parking::open(folder().path(), 1000, &"x".repeat(MAX_SETTINGS + 1)),
        Err(ParkingError::Settings(_))
    ));
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_said_once_and_leaves_no_file() {
    // What is written to the file that is opened here fails as on a full disk.
    fn full(path: &Path) -> io::Result<File> {
        fs::write(path, "the part that fitted")?;
        File::options().write(true).open("/dev/full")
    }
    let dir = folder();
    let parking = Parking::open_with(dir.path(), PLENTY, SETTINGS, full).unwrap();
    for token in 1..=3 {
        park(&parking, &[token]);
        assert_eq!((parking.find(&[token]), files(dir.path())), (None, vec![]));
    }
    let notices = parking.notices();
    assert!(matches!(&notices[..], [Notice::NotWritten { why }] if why.contains("No space left")), "{notices:?}");
    assert_eq!((parking.stats().failed, parking.stats().bytes), (3, 0));
    drop(parking);
    let parking = open(dir.path());
    park(&parking, &[1]);
    assert_eq!(restored(&parking, &[1]), Some(state_of(&[1])));
}

#[test]
fn it_is_said_again_when_writing_worked_meanwhile() {
    // A folder where the partial file would be.
    let dir = folder();
    let parking = open(dir.path());
    let in_the_way = dir.path().join(Key::new(SETTINGS, &[1]).file(PARTIAL));
    for _ in 0..2 {
        fs::create_dir(&in_the_way).unwrap();
        park(&parking, &[1]);
        park(&parking, &[1]);
        let notices = parking.notices();
        let said = notices.iter().filter(|notice| matches!(notice, Notice::NotWritten { .. }));
        assert_eq!(said.count(), 1, "{notices:?}");
        fs::remove_dir(&in_the_way).unwrap();
        park(&parking, &[2]);
        fs::remove_file(dir.path().join(Key::new(SETTINGS, &[2]).file(PARKED))).unwrap();
        assert_eq!(parking.load(&parking.find(&[2]).unwrap()).ok(), None);
    }
}

#[test]
fn no_more_wait_than_may() {
    // Opening a file waits for whoever holds this lock.
    static DISK: Mutex<()> = Mutex::new(());
    fn slow(path: &Path) -> io::Result<File> {
        let _held = DISK.lock();
        create_private(path)
    }
    let dir = folder();
    let parking = Parking::open_with(dir.path(), PLENTY, SETTINGS, slow).unwrap();
    let disk = DISK.lock();
    let mut queued = 0;
    let returned = loop {
        match parking.store(&[queued], state_of(&[queued])) {
            Stored::Queued => queued += 1,
            Stored::Busy(state) => break state,
            other => panic!("{other:?}"),
        }
        assert!(queued <= QUEUE as i32 + 1);
    };
    assert_eq!(returned, state_of(&[queued]));
    assert_eq!((parking.stats().queued, parking.stats().queued_bytes), (queued as usize, 1000 * queued as u64));
    drop(disk);
    parking.flush();
    assert_eq!((parking.stats().queued, parking.stats().entries), (0, queued as usize));
}

#[test]
fn a_folder_has_one_server() {
    let dir = folder();
    let parking = open(dir.path());
    assert!(matches!(Parking::open(dir.path(), PLENTY, OTHERS), Err(ParkingError::InUse(_))));
    drop(parking);
    open(dir.path());
}

#[test]
fn what_is_not_ours_is_left() {
    let dir = folder();
    let hex = "0".repeat(32);
    let names =
        ["notes.parked", "notes.partial", "readme", &format!("{hex}.parked2"), &format!("+{}.parked", &hex[1..])];
    for name in names {
        fs::write(dir.path().join(name), "mine").unwrap();
    }
    fs::create_dir(dir.path().join(format!("{hex}.parked"))).unwrap();
    let parking = open(dir.path());
    assert!(matches!(&parking.notices()[..], [Notice::Unreadable { .. }]));
    assert_eq!(files(dir.path()).len(), 6);
    assert_eq!(parking.stats().entries, 0);
}

#[cfg(unix)]
#[test]
fn links_are_not_followed_and_files_are_private() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let outside = folder();
    let dir = outside.path().join("a/b");
    let parking = open(&dir);
    let precious = outside.path().join("precious");
    fs::write(&precious, "mine").unwrap();
    symlink(&precious, dir.join(Key::new(SETTINGS, &[1]).file(PARTIAL))).unwrap();
    park(&parking, &[1]);
    assert_eq!(fs::read(&precious).unwrap(), b"mine");
    park(&parking, &[1]);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&dir), mode(&only_file(&dir))), (0o700, 0o600));
    drop(parking);
    let parked = only_file(&dir);
    fs::rename(&parked, &precious).unwrap();
    symlink(&precious, &parked).unwrap();
    assert_eq!(open(&dir).stats().entries, 0);
    assert!(precious.exists());
}
