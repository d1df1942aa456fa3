//! virsh's layouts: tables, and facts below one another.

/// Lays out rows below a heading as virsh does: cells are as wide as the widest of their column, and begin three spaces
/// after it. Without `heading` there is neither that nor the line below it.
pub fn table(heading: Option<&[&str]>, rows: &[Vec<String>]) -> String {
    let heading = heading.map(|cells| {
        cells
            .iter()
            .map(|&cell| cell.to_owned())
            .collect::<Vec<_>>()
    });
    let lines: Vec<_> = heading.iter().chain(rows).collect();
    let columns = lines
        .iter()
        .map(|line| line.len())
        .max()
        .unwrap_or_default();
    let width = |column: usize| {
        let cells = lines.iter().filter_map(|line| line.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    let line = |cells: &Vec<String>| {
        let padded = cells
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(column, (cell, &width))| match column + 1 == columns {
                true => format!(" {cell}"),
                false => format!(" {cell:width$}  "),
            });
        padded.collect::<String>() + "\n"
    };
    let mut text = String::new();
    if let Some(heading) = &heading {
        text += &line(heading);
        text += &"-".repeat(widths.iter().map(|width| width + 3).sum());
        text.push('\n');
    }
    text.extend(rows.iter().map(line));
    text
}

/// Lays out facts: each with its name, a colon, and its value from column `width` on.
pub fn facts(width: usize, facts: &[(&str, String)]) -> String {
    let lines = facts
        .iter()
        .map(|(name, value)| format!("{:<width$}{value}\n", format!("{name}:")));
    lines.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(rows: &[&[&str]]) -> Vec<Vec<String>> {
        let row = |cells: &&[&str]| cells.iter().map(|&cell| cell.to_owned()).collect();
        rows.iter().map(row).collect()
    }

    /// The expected texts are those of virsh 9.0 for its test driver.
    #[test]
    fn tables_are_virshs() {
        let heading: &[&str] = &["Id", "Name", "State"];
        assert_eq!(
            table(Some(heading), &rows(&[&["1", "test", "running"]])),
            " Id   Name   State\n----------------------\n 1    test   running\n"
        );
        assert_eq!(
            table(Some(heading), &[]),
            " Id   Name   State\n--------------------\n"
        );
        let heading: &[&str] = &["Id", "Name", "State", "Title"];
        assert_eq!(
            table(Some(heading), &rows(&[&["1", "test", "running", ""]])),
            " Id   Name   State     Title\n------------------------------\n 1    test   running   \n"
        );
        assert_eq!(
            table(None, &rows(&[&["default", "active", "no", "yes"]])),
            " default   active   no   yes\n"
        );
        assert_eq!(table(None, &[]), "");
    }

    #[test]
    fn facts_have_their_values_in_one_column() {
        let lines = [("Id", "-".to_owned()), ("Name", "test".to_owned())];
        assert_eq!(
            facts(16, &lines),
            "Id:             -\nName:           test\n"
        );
    }
}
