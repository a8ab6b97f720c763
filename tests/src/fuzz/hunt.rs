//! Looks for a frame that ends otherwise in the kernel than on the host, and makes it short enough to be read. Does not
//! know which program it is.

use std::fmt;

use super::layers::{dump, layers};
use super::mutate::SHORTEST;
use super::{Subject, corpus};

/// Frames between two looks at the counters, which take longer than a frame does.
pub const BATCH: usize = 4096;

/// Attempts to make a frame shorter or plainer.
const MOST_ATTEMPTS: usize = 4000;

/// A frame that does not end in the kernel as on the host.
#[derive(Debug, Clone)]
pub struct Mismatch {
    /// Under which subject.
    pub subject: String,
    /// How they differ.
    pub what: String,
    /// As short and plain as it got.
    pub frame: Vec<u8>,
    /// As it was found.
    pub found: Vec<u8>,
}

impl std::error::Error for Mismatch {}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}", self.subject, self.what)?;
        writeln!(f, "frame: {}", corpus::written(&self.frame))?;
        f.write_str(&dump(&self.frame))?;
        write!(f, "as it was found: {}", corpus::written(&self.found))
    }
}

/// Runs frames, and compares counters after every batch of them.
pub fn hunt(
    subject: Box<dyn Subject>,
    frames: impl Iterator<Item = Vec<u8>>,
) -> Result<Hunter, Box<Mismatch>> {
    let mut hunter = Hunter::new(subject);
    for frame in frames {
        hunter.run(&frame)?;
    }
    hunter.settle()?;
    Ok(hunter)
}

/// A subject with the frames whose counters have not been compared yet.
pub struct Hunter {
    pub subject: Box<dyn Subject>,
    batch: Vec<Vec<u8>>,
}

impl Hunter {
    pub fn new(subject: Box<dyn Subject>) -> Self {
        Self { subject, batch: Vec::with_capacity(BATCH) }
    }

    /// The number of the frame's outcome.
    pub fn run(&mut self, frame: &[u8]) -> Result<usize, Box<Mismatch>> {
        let Ok(outcome) = self.subject.run(frame) else {
            return Err(Box::new(explained(&mut *self.subject, frame)));
        };
        self.batch.push(frame.to_vec());
        if self.batch.len() == BATCH {
            self.settle()?;
        }
        Ok(outcome)
    }

    /// Compares the counters now.
    pub fn settle(&mut self) -> Result<(), Box<Mismatch>> {
        let batch = std::mem::take(&mut self.batch);
        let Err(what) = self.subject.settle() else { return Ok(()) };
        // One of them did it. Counters are compared after each now.
        for frame in &batch {
            if difference(&mut *self.subject, frame).is_some() {
                return Err(Box::new(explained(&mut *self.subject, frame)));
            }
        }
        let what = format!("{what} (no frame of the batch alone does it)");
        let (subject, frame, found) = (self.subject.name(), Vec::new(), Vec::new());
        Err(Box::new(Mismatch { subject, what, frame, found }))
    }
}

fn difference(subject: &mut dyn Subject, frame: &[u8]) -> Option<String> {
    let ran = subject.run(frame);
    let settled = subject.settle();
    ran.err().or(settled.err())
}

fn explained(subject: &mut dyn Subject, found: &[u8]) -> Mismatch {
    // What was counted before is not this frame's.
    _ = subject.settle();
    let frame = shrunk(found, |frame| difference(subject, frame).is_some());
    let what = difference(subject, &frame).unwrap_or_else(|| "seen once and not again".to_owned());
    Mismatch { subject: subject.name(), what, frame, found: found.to_vec() }
}

/// A shorter or plainer frame of which the same holds: without its tail, without some of its headers, zeros for bytes.
pub fn shrunk(frame: &[u8], mut holds: impl FnMut(&[u8]) -> bool) -> Vec<u8> {
    let mut best = frame.to_vec();
    let mut attempts = 0;
    loop {
        let Some(plainer) = candidates(&best).find(|candidate| {
            attempts += 1;
            attempts <= MOST_ATTEMPTS && holds(candidate)
        }) else {
            return best;
        };
        best = plainer;
    }
}

fn candidates(frame: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    let length = frame.len();
    let steps = [length / 2, length / 4, 64, 16, 4, 1];
    let cut = steps.into_iter().filter(move |step| *step > 0 && length >= SHORTEST + step);
    let cut = cut.map(move |step| frame[..length - step].to_vec());
    let without = layers(frame).into_iter().skip(1).map(move |layer| {
        let mut frame = frame.to_vec();
        frame.drain(layer.at..layer.end());
        frame
    });
    let blocks = [256, 64, 16, 4, 1]
        .into_iter()
        .flat_map(move |block| (0..length).step_by(block).map(move |at| at..(at + block).min(length)));
    let plain =
        blocks.filter(move |range| frame[range.clone()].iter().any(|byte| *byte != 0)).map(move |range| {
            let mut frame = frame.to_vec();
            frame[range].fill(0);
            frame
        });
    cut.chain(without.filter(|frame| frame.len() >= SHORTEST)).chain(plain)
}

/// Where the bytes of two frames part.
pub fn differing(kernel: &[u8], host: &[u8], outcome: &str) -> String {
    let at = kernel.iter().zip(host).take_while(|(one, other)| one == other).count();
    let tail = |bytes: &[u8]| corpus::written(&bytes[at..bytes.len().min(at + 24)]);
    format!(
        "from byte {at} on the frame ({} bytes) is {} in the kernel, and {} on the host ({} bytes), which says {outcome}",
        kernel.len(),
        tail(kernel),
        tail(host),
        host.len(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program that counts one frame too few, or says something else, where a byte is 7.
    struct Faulty {
        counts: bool,
        off: bool,
    }

    impl Subject for Faulty {
        fn name(&self) -> String {
            "faulty".into()
        }

        fn run(&mut self, frame: &[u8]) -> Result<usize, String> {
            let faulty = frame.contains(&7);
            self.off |= faulty;
            if faulty && !self.counts { Err("another verdict".into()) } else { Ok(0) }
        }

        fn settle(&mut self) -> Result<(), String> {
            let off = std::mem::take(&mut self.off);
            if off && self.counts { Err("one too few".into()) } else { Ok(()) }
        }

        fn counted(&self) -> Vec<(&'static str, u64)> {
            Vec::new()
        }
    }

    #[test]
    fn a_mismatch_is_found_and_made_plain_whether_in_verdict_or_in_counters() {
        for counts in [false, true] {
            let frames = (0..10_000u32).map(|number| {
                let mut frame = vec![0xaa; 300];
                frame[100] = if number == 6000 { 7 } else { 8 };
                frame
            });
            let mismatch =
                hunt(Box::new(Faulty { counts, off: false }), frames).err().expect("one of them is faulty");
            assert_eq!(mismatch.what, if counts { "one too few" } else { "another verdict" });
            assert!(mismatch.frame.len() <= 101 && mismatch.frame.iter().all(|byte| matches!(byte, 0 | 7)));
            assert_eq!(mismatch.found.len(), 300);
            assert!(mismatch.to_string().contains("ethernet"));
        }
    }
}
