//! Windows of their own for single layers, as `--lazy-windows` writes them.

use std::{collections::BTreeMap, fmt, str::FromStr};

use super::policy::parse_range;

/// Windows of single layers, where they are not [`super::LazyParams::n_window`].
///
/// Written as `3=256,9-12=2048`: layers, and the recent tokens that each keeps while it is lazy.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LayerWindows(BTreeMap<usize, usize>);

/// Why an argument is no list of windows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not LAYER=TOKENS or FIRST-LAST=TOKENS, as in 3=256,9-12=2048")]
pub struct ParseWindowsError(String);

impl LayerWindows {
    /// A layer's own window, if it has one.
    pub fn get(&self, layer: usize) -> Option<usize> {
        self.0.get(&layer).copied()
    }

    pub fn insert(&mut self, layer: usize, n_window: usize) {
        self.0.insert(layer, n_window);
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Layers and their windows, by the layers' numbers.
    pub fn iter(&self) -> impl Iterator<Item = (usize, usize)> {
        self.0.iter().map(|(&layer, &n_window)| (layer, n_window))
    }

    /// These windows, and those of `others` for layers that have none here.
    #[must_use]
    pub fn or(&self, others: &LayerWindows) -> LayerWindows {
        others.iter().chain(self.iter()).collect()
    }
}

impl FromIterator<(usize, usize)> for LayerWindows {
    fn from_iter<I: IntoIterator<Item = (usize, usize)>>(windows: I) -> LayerWindows {
        LayerWindows(windows.into_iter().collect())
    }
}

impl FromStr for LayerWindows {
    type Err = ParseWindowsError;

    fn from_str(text: &str) -> Result<LayerWindows, ParseWindowsError> {
        let mut windows = BTreeMap::new();
        for part in text.split(',') {
            let wrong = || ParseWindowsError(part.to_owned());
            let (layers, tokens) = part.split_once('=').ok_or_else(wrong)?;
            let tokens = tokens.trim().parse().ok().filter(|&n: &usize| n > 0 && n <= i32::MAX as usize);
            let tokens = tokens.ok_or_else(wrong)?;
            windows.extend(parse_range(layers).ok_or_else(wrong)?.map(|layer| (layer, tokens)));
        }
        Ok(LayerWindows(windows))
    }
}

impl fmt::Display for LayerWindows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list: Vec<String> = self.iter().map(|(layer, n_window)| format!("{layer}={n_window}")).collect();
        f.write_str(&list.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn syntax() {
        let windows: LayerWindows = "3=256,9-11=2048,10=512".parse().unwrap();
        assert_eq!(windows.to_string(), "3=256,9=2048,10=512,11=2048");
        assert_eq!(windows.to_string().parse(), Ok(windows.clone()));
        assert_eq!((windows.get(9), windows.get(4)), (Some(2048), None));
        for text in ["", "3", "3=", "=3", "3=0", "3=-1", "5-3=8", "3=99999999999", "3=1=2", "99999=1"] {
            let error = text.parse::<LayerWindows>().unwrap_err().to_string();
            assert!(error.contains("LAYER=TOKENS"), "{text}");
        }
    }

    #[test]
    fn own_windows_come_first() {
        let [own, others] = ["3=256", "3=512,4=128"].map(|text| text.parse::<LayerWindows>().unwrap());
        assert_eq!(own.or(&others).to_string(), "3=256,4=128");
    }
}
