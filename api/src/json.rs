//! Reads values from JSON, with errors that name the place.

use serde::de::DeserializeOwned;

use crate::fault::Fault;

/// Reads a body, or another object in JSON.
///
/// # Errors
/// If it is not an object in JSON, or not of this type. The error names the field and the place.
pub fn parse_json<T: DeserializeOwned>(text: &[u8]) -> Result<T, Fault> {
    // Serde would also accept an array with the members of a struct in order.
    if text.trim_ascii_start().starts_with(b"[") {
        return Err(Fault::Body {
            field: String::new(),
            message: "it is an array, but has to be an object".to_string(),
        });
    }
    parse_value(text)
}

/// Reads any value in JSON.
///
/// # Errors
/// If it is not JSON, or not of this type. The error names the field and the place.
pub fn parse_value<T: DeserializeOwned>(text: &[u8]) -> Result<T, Fault> {
    let mut deserializer = serde_json::Deserializer::from_slice(text);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        // Members whose names are not known yet show as question marks.
        let path = error.path().to_string();
        let field = match path.trim_end_matches(['.', '?']) {
            "" => String::new(),
            field => format!("{field}: "),
        };
        let message = error.into_inner().to_string().replace('\n', " ");
        Fault::Body { field, message }
    })?;
    deserializer.end().map_err(|error| Fault::Body {
        field: String::new(),
        message: error.to_string(),
    })?;
    Ok(value)
}
