//! What becomes of saved state that is not what was saved.

use bantam_state::Section;
use bolero::TypeGenerator;
use bolero::generator::produce;

/// Bytes of a section that are others. Its checksum does not tell, as somebody may have written it so.
#[derive(Debug, Clone, Default, TypeGenerator)]
pub struct Damage {
    /// Where bytes change, counted from the end of the section, and how.
    #[generator(produce::<Vec<(u16, u8)>>().with().len(0..4usize))]
    changes: Vec<(u16, u8)>,
    /// Whether the rest is lost from the first of these places on.
    is_cut: bool,
}

impl Damage {
    /// The section after it, if that still has the form of one.
    pub fn done_to(&self, section: &Section) -> Option<Section> {
        let mut bytes = postcard::to_stdvec(section).unwrap();
        for &(place, change) in &self.changes {
            let place = bytes.len() - 1 - usize::from(place) % bytes.len();
            bytes[place] ^= change;
        }
        if let (true, Some(&(place, _))) = (self.is_cut, self.changes.first()) {
            bytes.truncate(bytes.len() - 1 - usize::from(place) % bytes.len());
        }
        postcard::from_bytes(&bytes).ok()
    }
}
