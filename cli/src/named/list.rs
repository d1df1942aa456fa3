//! `bantam list`.

use bantam_manager::{Entry, Manager};
use serde_json::{Value, json};

use super::args::{ListArgs, Output};
use super::{print, print_json, table};

pub fn list(args: &ListArgs) -> anyhow::Result<()> {
    let manager = Manager::of_user()?;
    if args.name && args.all && args.output == Output::Text {
        // Nobody is asked, so completions are quick.
        let names = manager.machines()?;
        return print(
            &names
                .iter()
                .map(|it| format!("{}\n", it.name()))
                .collect::<String>(),
        );
    }
    let entries = manager.list(args.all)?;
    match (args.output, args.name) {
        (Output::Json, _) => print_json(&entries.iter().map(json).collect::<Vec<_>>()),
        (Output::Text, true) => {
            let names = entries.iter().map(|it| format!("{}\n", it.machine.name()));
            print(&names.collect::<String>())
        }
        (Output::Text, false) => {
            let heading = vec!["NAME".to_owned(), "STATE".to_owned()];
            let row =
                |it: &Entry| vec![it.machine.name().to_string(), it.state.as_str().to_owned()];
            let rows: Vec<_> = std::iter::once(heading)
                .chain(entries.iter().map(row))
                .collect();
            print(&table(&rows))
        }
    }
}

fn json(entry: &Entry) -> Value {
    json!({
        "name": entry.machine.name(),
        "state": entry.state.as_str(),
        "autostart": entry.machine.is_autostarted(),
    })
}
