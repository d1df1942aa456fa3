//! Damage to saved state.

use bantam_state::Section;
use bolero::TypeGenerator;
use bolero::generator::produce;

/// Changed bytes of a section. Its checksum does not reveal them, as someone may have written the section
/// that way.
#[derive(Debug, Clone, Default, TypeGenerator)]
pub struct Damage {
    /// The positions of changed bytes, counted from the end of the section, and the changes.
    #[generator(produce::<Vec<(u16, u8)>>().with().len(0..4usize))]
    changes: Vec<(u16, u8)>,
    /// Whether the section is cut off at the first of these positions.
    is_cut: bool,
}

impl Damage {
    /// Returns the damaged section, if it still has the form of one.
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
