//! The table, and the file with its rows.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use serde::Serialize;

use crate::monitors::{Monitors, PEER};
use crate::statistics::Samples;

/// The goal of a measurement.
#[derive(Debug, Clone, Copy)]
pub enum Goal {
    /// At most this, in the row's unit.
    AtMost(f64),
    /// At most this fraction of the peer's.
    RatioAtMost(f64),
    /// At least this fraction of the peer's.
    RatioAtLeast(f64),
    /// None: the row is for information.
    None,
}

/// The peer of a row, with which Bantam is compared.
#[derive(Debug)]
pub struct Peer {
    /// `None` is the other monitor.
    name: Option<&'static str>,
    samples: Samples,
}

impl Peer {
    /// Makes the other monitor the peer.
    pub fn monitor(samples: Samples) -> Self {
        Self {
            name: None,
            samples,
        }
    }

    /// Makes something else the peer.
    pub fn named(name: &'static str, samples: Samples) -> Self {
        Self {
            name: Some(name),
            samples,
        }
    }
}

/// One row: Bantam's measurements, and the peer's, if there are any.
#[derive(Debug)]
pub struct Row {
    /// What is measured.
    pub name: String,
    /// The unit of all numbers except the ratio.
    pub unit: &'static str,
    /// Bantam's measurements.
    pub bantam: Samples,
    /// The peer's measurements.
    pub peer: Option<Peer>,
    /// The goal for Bantam.
    pub goal: Goal,
}

impl Row {
    fn ratio(&self) -> Option<f64> {
        let peer = self.peer.as_ref()?.samples.median();
        Some(self.bantam.median() / peer)
    }

    fn is_met(&self) -> bool {
        match self.goal {
            Goal::AtMost(limit) => self.bantam.median() <= limit,
            Goal::RatioAtMost(limit) => self.ratio().is_some_and(|ratio| ratio <= limit),
            Goal::RatioAtLeast(limit) => self.ratio().is_some_and(|ratio| ratio >= limit),
            Goal::None => true,
        }
    }

    fn goal_text(&self) -> Option<String> {
        let peer = self.peer.as_ref().and_then(|peer| peer.name);
        let peer = peer.unwrap_or(PEER);
        match self.goal {
            Goal::AtMost(limit) => Some(format!("at most {limit} {}", self.unit)),
            Goal::RatioAtMost(limit) => Some(format!("at most {limit} of {peer}'s")),
            Goal::RatioAtLeast(limit) => Some(format!("at least {limit} of {peer}'s")),
            Goal::None => None,
        }
    }
}

/// A row in the JSON file. All numbers are medians.
#[derive(Serialize)]
struct Record<'a> {
    name: &'a str,
    unit: &'a str,
    bantam: f64,
    /// Null if the peer is not measured, like the numbers that need it.
    peer_name: Option<&'a str>,
    peer: Option<f64>,
    ratio: Option<f64>,
    /// Null if there is none, which counts as met.
    goal: Option<String>,
    met: bool,
    runs: usize,
}

/// All rows of one run of the benchmarks.
pub struct Report {
    heading: String,
    peer_name: String,
    rows: Vec<Row>,
}

impl Report {
    /// Makes a report without rows.
    pub fn new(monitors: &Monitors) -> Self {
        Self {
            heading: monitors.description(),
            peer_name: monitors.peer_name().to_owned(),
            rows: Vec::new(),
        }
    }

    /// Adds a row at the end.
    pub fn add(&mut self, row: Row) {
        self.rows.push(row);
    }

    /// Prints the table.
    pub fn print(&self) {
        let mut table =
            vec![["", "unit", "bantam", "peer", "ratio", "goal", "met"].map(String::from)];
        for row in &self.rows {
            table.push([
                row.name.clone(),
                row.unit.to_owned(),
                cell(&row.bantam),
                row.peer
                    .as_ref()
                    .map(|peer| cell(&peer.samples))
                    .unwrap_or_default(),
                row.ratio()
                    .map(|ratio| format!("{ratio:.3}"))
                    .unwrap_or_default(),
                row.goal_text().unwrap_or_default(),
                match (row.goal, row.is_met()) {
                    (Goal::None, _) => "",
                    (_, true) => "yes",
                    (_, false) => "NO",
                }
                .to_owned(),
            ]);
        }
        let widths: [usize; 7] = std::array::from_fn(|column| {
            let widths = table.iter().map(|cells| cells[column].chars().count());
            widths.max().unwrap_or(0)
        });
        println!("{}", self.heading);
        println!("Each number is a median, with the least and the greatest behind it.\n");
        for cells in &table {
            let mut line = String::new();
            for (cell, width) in cells.iter().zip(widths) {
                write!(line, "{cell:<width$}  ").expect("text grows");
            }
            println!("{}", line.trim_end());
        }
    }

    /// Writes the rows as a JSON array to the file `path`.
    pub fn write(&self, path: &Path) {
        let records: Vec<Record<'_>> = self
            .rows
            .iter()
            .map(|row| Record {
                name: &row.name,
                unit: row.unit,
                bantam: row.bantam.median(),
                peer_name: row
                    .peer
                    .as_ref()
                    .map(|peer| peer.name.unwrap_or(&self.peer_name)),
                peer: row.peer.as_ref().map(|peer| peer.samples.median()),
                ratio: row.ratio(),
                goal: row.goal_text(),
                met: row.is_met(),
                runs: row.bantam.count(),
            })
            .collect();
        let text = serde_json::to_string_pretty(&records).expect("rows are plain data");
        fs::write(path, text + "\n")
            .unwrap_or_else(|error| panic!("cannot write '{}': {error}", path.display()));
        println!("\nwritten to {}", path.display());
    }
}

fn cell(samples: &Samples) -> String {
    let digits = match samples.median() {
        1000.0.. => 0,
        100.0.. => 1,
        _ => 2,
    };
    let median = format!("{:.digits$}", samples.median());
    if samples.count() == 1 {
        return median;
    }
    format!(
        "{median} ({:.digits$}..{:.digits$})",
        samples.least(),
        samples.greatest()
    )
}
