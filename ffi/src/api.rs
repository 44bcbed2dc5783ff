//! How functions of llama.h are defined: where a call goes, and what stands around our own body.

use std::ffi::CStr;

/// Defines functions of llama.h: `fn name(args) -> type, or VALUE, { body }`, where the body is a `Result` and VALUE is
/// returned when it is an error. Arguments that another llama.cpp has with other fields are read with care (`caller`). That the signature is the header's is checked by the compiler. A call with handles of
/// unmodified llama.cpp goes there in the body's stead, and what that throws goes on to the caller.
macro_rules! api {
    ($($(#[$meta:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)?, or $failed:expr, $body:block)*) => {$(
        $(#[$meta])*
        #[unsafe(no_mangle)]
        unsafe extern "C-unwind" fn $name(
            $($arg: <$ty as $crate::upstream::Crossing>::Raw),*
        ) $(-> <$ret as $crate::upstream::Crossing>::Raw)? {
            unsafe extern "C" fn ours($($arg: $ty),*) $(-> $ret)? {
                $crate::border::guard(stringify!($name), $failed, || $body)
            }
            const _: () = {
                let _same_signature = [ggml_sys::$name, ours];
            };
            const NAME: &std::ffi::CStr = $crate::api::c_name(concat!(stringify!($name), "\0"));
            use $crate::upstream::Crossing;
            fn refused(failure: $crate::border::Failure) $(-> $ret)? {
                $crate::border::guard(stringify!($name), $failed, || Err(failure))
            }
            let read = || -> $crate::border::Result<_> { Ok(($(<$ty as Crossing>::read($arg)?,)*)) };
            let ($($arg,)*) = match read() {
                Ok(arguments) => arguments,
                Err(failure) => return refused(failure).raw(),
            };
            let result = match $crate::upstream::route(NAME, &[$($arg.side()),*]) {
                // SAFETY: the caller's promise is the same.
                Ok(None) => unsafe { ours($($arg),*) },
                Ok(Some((function, of))) => {
                    type Function = unsafe extern "C-unwind" fn($($ty),*) $(-> $ret)?;
                    // SAFETY: llama.cpp's function of this name has this signature, and the handles are its own.
                    unsafe {
                        let function = std::mem::transmute::<std::ptr::NonNull<std::ffi::c_void>, Function>(function);
                        function($($arg.given()),*).noted(of)
                    }
                }
                Err(failure) => refused(failure),
            };
            result.raw()
        }
    )*};
}

/// A function's name for the dynamic linker.
pub(crate) const fn c_name(with_nul: &'static str) -> &'static CStr {
    match CStr::from_bytes_with_nul(with_nul.as_bytes()) {
        Ok(name) => name,
        Err(_) => c"",
    }
}
