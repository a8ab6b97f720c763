//! Named frames on lines of a file: `name` and the frame's bytes in hex, where `ab*20` stands for twenty bytes `ab`.

use std::collections::HashSet;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// More equal bytes than this are written as a count.
const FEWEST_REPEATED: usize = 8;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Case {
    /// In kebab case; unique in its file.
    pub name: String,
    pub frame: Vec<u8>,
}

/// The cases of a file; none where there is no file.
pub fn read(path: &Path) -> Result<Vec<Case>> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let mut names = HashSet::new();
    let mut cases = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.starts_with('#')) {
        let case = parsed(line).with_context(|| format!("{}:{}", path.display(), number + 1))?;
        ensure!(names.insert(case.name.clone()), "{}: `{}` is there twice", path.display(), case.name);
        cases.push(case);
    }
    Ok(cases)
}

pub fn write(path: &Path, heading: &str, cases: &[Case]) -> Result<()> {
    let mut text = format!("# {heading}\n");
    for case in cases {
        text.push_str(&line(case));
    }
    let directory = path.parent().unwrap_or(path);
    let written = std::fs::create_dir_all(directory).and_then(|()| std::fs::write(path, text));
    written.with_context(|| path.display().to_string())
}

/// A case as it stands in a file.
pub fn line(case: &Case) -> String {
    format!("{} {}\n", case.name, written(&case.frame))
}

fn parsed(line: &str) -> Result<Case> {
    let mut words = line.split_whitespace();
    let name = words.next().context("an empty line")?.to_owned();
    let mut frame = Vec::new();
    for word in words {
        match word.split_once('*') {
            Some((byte, count)) => {
                let byte = u8::from_str_radix(byte, 16).with_context(|| word.to_owned())?;
                let count: u16 = count.parse().with_context(|| word.to_owned())?;
                frame.extend(std::iter::repeat_n(byte, usize::from(count)));
            }
            None => frame.extend(bytes(word)?),
        }
    }
    Ok(Case { name, frame })
}

fn bytes(word: &str) -> Result<Vec<u8>> {
    ensure!(word.is_ascii() && word.len().is_multiple_of(2), "`{word}` is no whole number of bytes");
    let byte = |at| u8::from_str_radix(&word[at..at + 2], 16).with_context(|| format!("`{word}` is not hex"));
    (0..word.len()).step_by(2).map(byte).collect()
}

/// Bytes as a case has them.
pub fn written(bytes: &[u8]) -> String {
    let mut text = String::new();
    for run in bytes.chunk_by(|a, b| a == b) {
        if run.len() > FEWEST_REPEATED {
            if !text.is_empty() && !text.ends_with(' ') {
                text.push(' ');
            }
            text.push_str(&format!("{:02x}*{} ", run[0], run.len()));
        } else {
            run.iter().for_each(|byte| text.push_str(&format!("{byte:02x}")));
        }
    }
    text.trim_end().to_owned()
}

/// A sentence as a name.
pub fn kebab(sentence: &str) -> String {
    let letters =
        sentence.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { ' ' });
    letters.collect::<String>().split_whitespace().collect::<Vec<_>>().join("-")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_frame_is_read_as_it_was_written(frame in proptest::collection::vec(0u8..3, 0..400)) {
            let case = Case { name: "a-frame".into(), frame };
            prop_assert_eq!(parsed(line(&case).trim_end()).unwrap(), case);
        }
    }

    #[test]
    fn a_line_says_what_is_wrong_with_it() {
        assert!(parsed("name 0").is_err());
        assert!(parsed("name zz").is_err());
        assert!(parsed("name 00*x").is_err());
        assert_eq!(kebab("IPv4, l2 (and more)"), "ipv4-l2-and-more");
    }
}
