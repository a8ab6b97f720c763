//! Frames that somebody gives to be explained: bytes, or hex digits. Knows neither files nor tables.

use serde::{Deserialize, Serialize};

/// Bytes of the longest frame that is taken.
pub const LONGEST: usize = 64 << 10;

/// The packet path reads no further: six extension headers of 2048 bytes, and all that is before and behind them.
const HEAD: usize = 16 << 10;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum GivenError {
    #[error("the frame is empty; give its bytes from the Ethernet header on")]
    Empty,
    #[error(
        "character {place}, `{found}`, is no hex digit; give 0-9 and a-f, blanks, colons and line ends between bytes"
    )]
    NotHex { place: usize, found: char },
    #[error("{digits} hex digits make no whole bytes; look for one that is missing")]
    Odd { digits: usize },
    #[error("the frame has {length} bytes; give one of {LONGEST} at the most")]
    TooLong { length: usize },
}

/// A frame whose end may be missing: captures often keep the beginning only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Given {
    bytes: Vec<u8>,
    length: usize,
}

/// As the API takes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FrameText {
    /// The frame from its Ethernet header on, or the beginning of it.
    pub hex: String,
    /// Bytes that the frame had, where its end is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub length: Option<usize>,
}

impl Given {
    /// The beginning of a frame that had `length` bytes.
    pub fn new(bytes: Vec<u8>, length: usize) -> Result<Self, GivenError> {
        let length = length.max(bytes.len());
        if bytes.is_empty() {
            return Err(GivenError::Empty);
        }
        if length > LONGEST {
            return Err(GivenError::TooLong { length });
        }
        Ok(Self { bytes, length })
    }

    /// Hex digits, in any case, with blanks, colons and line ends wherever they are.
    pub fn from_hex(text: &str) -> Result<Self, GivenError> {
        let mut digits = Vec::new();
        for (index, found) in text.chars().enumerate() {
            if found.is_whitespace() || found == ':' {
                continue;
            }
            let digit = found.to_digit(16).ok_or(GivenError::NotHex { place: index + 1, found })?;
            digits.push(digit as u8);
        }
        if digits.len() % 2 != 0 {
            return Err(GivenError::Odd { digits: digits.len() });
        }
        let bytes: Vec<u8> = digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect();
        let length = bytes.len();
        Self::new(bytes, length)
    }

    pub fn from_text(text: &FrameText) -> Result<Self, GivenError> {
        let given = Self::from_hex(&text.hex)?;
        let length = text.length.unwrap_or(0);
        Self::new(given.bytes, length)
    }

    /// What decides, and the length.
    pub fn to_text(&self) -> FrameText {
        let head = &self.bytes[..self.bytes.len().min(HEAD)];
        let mut hex = String::with_capacity(2 * head.len());
        for byte in head {
            hex.extend(
                [byte >> 4, byte & 15].map(|nibble| char::from(b"0123456789abcdef"[usize::from(nibble)])),
            );
        }
        FrameText { hex, length: (head.len() < self.length).then_some(self.length) }
    }

    /// The frame after so many bytes of room, with zeros for what is missing.
    pub(super) fn padded(&self, room: usize) -> Vec<u8> {
        let mut bytes = vec![0; room + self.length];
        bytes[room..room + self.bytes.len()].copy_from_slice(&self.bytes);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_is_taken_with_blanks_colons_and_line_ends() {
        let expected = Given { bytes: vec![0x01, 0xab, 0xcd], length: 3 };
        for text in ["01abcd", "01 AB cd", "01:ab:cd", "01a\nbcd\r\n", " 0 1abcd\t"] {
            assert_eq!(Given::from_hex(text), Ok(expected.clone()), "{text:?}");
        }
    }

    #[test]
    fn what_is_no_frame_is_named() {
        let long = "00".repeat(LONGEST + 1);
        for (text, expected) in [
            ("", GivenError::Empty),
            (" \n:", GivenError::Empty),
            ("0x01", GivenError::NotHex { place: 2, found: 'x' }),
            ("01 gg", GivenError::NotHex { place: 4, found: 'g' }),
            ("012", GivenError::Odd { digits: 3 }),
            (&long, GivenError::TooLong { length: LONGEST + 1 }),
        ] {
            assert_eq!(Given::from_hex(text), Err(expected), "{}", &text[..text.len().min(20)]);
        }
        let text = FrameText { hex: "00".to_owned(), length: Some(usize::MAX) };
        assert_eq!(Given::from_text(&text), Err(GivenError::TooLong { length: usize::MAX }));
    }

    #[test]
    fn a_frame_goes_as_text_and_comes_back() {
        let cut = Given::new(vec![0x5a; 96], 1514).unwrap();
        assert_eq!(Given::from_text(&cut.to_text()), Ok(cut.clone()));
        assert_eq!(cut.padded(2).len(), 2 + 1514);
        let long = Given::new(vec![0x5a; LONGEST], 0).unwrap();
        let back = Given::from_text(&long.to_text()).unwrap();
        assert_eq!((back.bytes.len(), back.length), (HEAD, LONGEST));
    }
}
