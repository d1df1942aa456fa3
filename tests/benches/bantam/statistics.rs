//! Statistics of repeated measurements.

/// Measurements of one thing, at least one.
#[derive(Debug, Clone)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Takes the measurements in any order.
    ///
    /// # Panics
    ///
    /// If there are none.
    pub fn new(mut values: Vec<f64>) -> Self {
        assert!(!values.is_empty(), "nothing was measured");
        values.sort_by(f64::total_cmp);
        Self(values)
    }

    /// Returns their number.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Returns the least.
    pub fn least(&self) -> f64 {
        self.0[0]
    }

    /// Returns the greatest.
    pub fn greatest(&self) -> f64 {
        self.0[self.count() - 1]
    }

    /// Returns the median: the middle one, or the mean of the two in the middle.
    pub fn median(&self) -> f64 {
        let middle = self.count() / 2;
        if self.count().is_multiple_of(2) {
            f64::midpoint(self.0[middle - 1], self.0[middle])
        } else {
            self.0[middle]
        }
    }
}

impl FromIterator<f64> for Samples {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        Self::new(values.into_iter().collect())
    }
}
