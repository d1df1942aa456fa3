//! XML as a tree of elements: read with limits, and written as libvirt lays it out.

use std::fmt::{self, Write};

use roxmltree::{Document, ParsingOptions};

use crate::error::Error;

/// Maximum number of bytes of a document.
const MAX_SIZE: usize = 1 << 20;
/// Maximum number of nodes: elements, texts, comments.
const MAX_NODES: u32 = 100_000;
/// Maximum number of attributes of an element. The parser compares all of them with one another.
const MAX_ATTRIBUTES: usize = 1000;
/// How deep elements can be within one another.
const MAX_DEPTH: usize = 64;

/// An element. Names of elements and attributes have the prefix of their namespace, if they have one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Element {
    pub(crate) name: String,
    pub(crate) attributes: Vec<(String, String)>,
    pub(crate) children: Vec<Node>,
}

/// What is in an element.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Node {
    Element(Element),
    Text(String),
}

impl Element {
    /// Makes an element without attributes and children.
    pub(crate) fn new(name: &str) -> Element {
        Element {
            name: name.to_owned(),
            attributes: Vec::new(),
            children: Vec::new(),
        }
    }

    /// Reads a document, and returns its root. There is no document type, so no entities are expanded but those of XML
    /// itself.
    ///
    /// # Errors
    /// If it is not well-formed XML, or larger or deeper than a domain needs to be.
    pub(crate) fn parse(text: &str) -> Result<Element, Error> {
        check_size(text)?;
        if has_many_attributes(text) {
            return Err(Error::Xml(format!(
                "an element has more than {MAX_ATTRIBUTES} attributes"
            )));
        }
        let options = ParsingOptions {
            allow_dtd: false,
            nodes_limit: MAX_NODES,
            ..ParsingOptions::default()
        };
        let document = Document::parse_with_options(text, options).map_err(|error| {
            Error::Xml(match error {
                roxmltree::Error::DtdDetected => {
                    "it has a document type (<!DOCTYPE ...>), whose entities are not expanded; \
                     remove it"
                        .to_owned()
                }
                roxmltree::Error::NodesLimitReached => {
                    format!("it has more than {MAX_NODES} elements and texts")
                }
                error => error.to_string().replace('\n', " "),
            })
        })?;
        // The order is that of the document, so each parent comes before its children.
        let mut depths = vec![0_usize; 1];
        for node in document.descendants().skip(1) {
            let parent = node.parent().map_or(0, |parent| parent.id().get_usize());
            let depth = depths.get(parent).copied().unwrap_or_default() + 1;
            if depth > MAX_DEPTH {
                return Err(Error::Xml(format!(
                    "its elements are more than {MAX_DEPTH} deep within one another"
                )));
            }
            depths.push(depth);
        }
        Ok(Element::of_node(document.root_element(), &mut Vec::new()))
    }

    /// Copies an element that lies in ones that declare these namespaces, by prefix. It declares others itself.
    fn of_node<'a>(
        node: roxmltree::Node<'a, 'a>,
        declared: &mut Vec<(&'a str, &'a str)>,
    ) -> Element {
        let outer = declared.len();
        let mut declarations = Vec::new();
        let mut name_of = |local: &str, namespace: Option<&'a str>| {
            let Some(uri) = namespace else {
                return local.to_owned();
            };
            let prefix = node.lookup_prefix(uri).unwrap_or_default();
            let known = declared.iter().rev().find(|(it, _)| *it == prefix);
            if prefix != "xml" && known.is_none_or(|(_, known)| *known != uri) {
                declared.push((prefix, uri));
                let attribute = match prefix {
                    "" => "xmlns".to_owned(),
                    _ => format!("xmlns:{prefix}"),
                };
                declarations.push((attribute, uri.to_owned()));
            }
            match prefix {
                "" => local.to_owned(),
                _ => format!("{prefix}:{local}"),
            }
        };
        let name = name_of(node.tag_name().name(), node.tag_name().namespace());
        let attributes: Vec<_> = node
            .attributes()
            .map(|it| (name_of(it.name(), it.namespace()), it.value().to_owned()))
            .collect();
        declarations.extend(attributes);
        let has_elements = node.children().any(|child| child.is_element());
        let children = node.children().filter_map(|child| match child.text() {
            _ if child.is_element() => Some(Node::Element(Element::of_node(child, declared))),
            Some(text) if child.is_text() => {
                let is_layout = has_elements && text.trim().is_empty();
                (!is_layout).then(|| Node::Text(text.to_owned()))
            }
            _ => None,
        });
        let children = children.collect();
        declared.truncate(outer);
        Element {
            name,
            attributes: declarations,
            children,
        }
    }

    /// Adds an attribute.
    pub(crate) fn attribute(mut self, name: &str, value: impl fmt::Display) -> Element {
        self.attributes.push((name.to_owned(), value.to_string()));
        self
    }

    /// Adds text.
    pub(crate) fn text(mut self, text: impl fmt::Display) -> Element {
        self.children.push(Node::Text(text.to_string()));
        self
    }

    /// Adds a child.
    pub(crate) fn child(mut self, child: Element) -> Element {
        self.push(child);
        self
    }

    /// Adds a child.
    pub(crate) fn push(&mut self, child: Element) {
        self.children.push(Node::Element(child));
    }

    /// Returns the value of an attribute.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        let found = self.attributes.iter().find(|(it, _)| it == name);
        found.map(|(_, value)| value.as_str())
    }

    /// Returns the elements in this one.
    pub(crate) fn elements(&self) -> impl Iterator<Item = &Element> {
        self.children.iter().filter_map(|node| match node {
            Node::Element(element) => Some(element),
            Node::Text(_) => None,
        })
    }

    /// Returns the elements in this one that have the name.
    pub(crate) fn all<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a Element> {
        self.elements().filter(move |it| it.name == name)
    }

    /// Returns the first element in this one that has the name.
    pub(crate) fn first(&self, name: &str) -> Option<&Element> {
        self.all(name).next()
    }

    /// Returns an attribute of the first element in this one that has the name.
    pub(crate) fn get_of(&self, child: &str, attribute: &str) -> Option<&str> {
        self.first(child)?.get(attribute)
    }

    /// Returns the text in this element itself.
    pub(crate) fn content(&self) -> String {
        let texts = self.children.iter().filter_map(|node| match node {
            Node::Text(text) => Some(text.as_str()),
            Node::Element(_) => None,
        });
        texts.collect()
    }

    /// Returns the text of the first element in this one that has the name.
    pub(crate) fn content_of(&self, child: &str) -> Option<String> {
        self.first(child).map(Element::content)
    }

    /// Whether XML can have all characters of the texts and values (XML 1.0, section 2.2).
    pub(crate) fn is_writable(&self) -> bool {
        let is_text = |text: &str| text.chars().all(is_xml);
        self.attributes.iter().all(|(_, value)| is_text(value))
            && self.children.iter().all(|node| match node {
                Node::Element(element) => element.is_writable(),
                Node::Text(text) => is_text(text),
            })
    }

    /// Puts U+FFFD in the place of characters that XML cannot have.
    pub(crate) fn make_writable(&mut self) {
        let mend = |text: &mut String| {
            if !text.chars().all(is_xml) {
                *text = text
                    .chars()
                    .map(|c| if is_xml(c) { c } else { '\u{fffd}' })
                    .collect();
            }
        };
        for (_, value) in &mut self.attributes {
            mend(value);
        }
        for node in &mut self.children {
            match node {
                Node::Element(element) => element.make_writable(),
                Node::Text(text) => mend(text),
            }
        }
    }

    fn write(&self, indent: usize, text: &mut String) -> fmt::Result {
        write!(text, "<{}", self.name)?;
        for (name, value) in &self.attributes {
            write!(text, " {name}='")?;
            escape(value, true, text)?;
            text.write_char('\'')?;
        }
        if self.children.is_empty() {
            return text.write_str("/>");
        }
        text.write_char('>')?;
        let is_laid_out = self
            .children
            .iter()
            .all(|node| matches!(node, Node::Element(_)));
        for node in &self.children {
            if is_laid_out {
                write!(text, "\n{:1$}", "", indent + 2)?;
            }
            match node {
                Node::Element(element) => element.write(indent + 2, text)?,
                Node::Text(content) => escape(content, false, text)?,
            }
        }
        if is_laid_out {
            write!(text, "\n{:indent$}", "")?;
        }
        write!(text, "</{}>", self.name)
    }
}

/// Writes the element as a document, without a declaration.
impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = String::new();
        self.write(0, &mut text)?;
        writeln!(f, "{text}")
    }
}

/// Refuses a document that is too large.
///
/// # Errors
/// If it is.
pub(crate) fn check_size(text: &str) -> Result<(), Error> {
    match text.len() > MAX_SIZE {
        true => Err(Error::Xml("it is larger than 1 MiB".to_owned())),
        false => Ok(()),
    }
}

/// Whether an element looks as if it had more attributes than it may have.
fn has_many_attributes(text: &str) -> bool {
    let is_value = |rest: &str| rest.trim_ascii_start().starts_with(['"', '\'']);
    text.split('<').any(|tag| {
        let values = tag.split('=').skip(1).filter(|rest| is_value(rest));
        values.count() > MAX_ATTRIBUTES
    })
}

/// Whether XML can have the character.
fn is_xml(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\r' | ' '..='\u{fffd}' | '\u{10000}'..)
}

/// Writes the text of an element, or a value between single quotes.
fn escape(content: &str, is_value: bool, text: &mut String) -> fmt::Result {
    for c in content.chars() {
        match c {
            '&' => text.write_str("&amp;")?,
            '<' => text.write_str("&lt;")?,
            '>' => text.write_str("&gt;")?,
            '\'' if is_value => text.write_str("&apos;")?,
            // A reader makes line feeds of these, and spaces if they are in a value.
            '\r' => text.write_str("&#13;")?,
            '\t' | '\n' if is_value => write!(text, "&#{};", u32::from(c))?,
            c => text.write_char(c)?,
        }
    }
    Ok(())
}
