//! What the guest's user lets it reach.
//!
//! A rule that denies is stronger than one that allows, whatever their order. If there are any that allow,
//! everything else is denied.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::dns::{self, Answer};
use crate::rule::Rule;

/// Most addresses of names that are known at a time.
const MAX_NAMED: usize = 4096;
/// The least time for which an answer is valid: a program may need a moment to use it.
const MIN_TIME: Duration = Duration::from_secs(5);
/// The longest time, so that servers cannot open an address for years.
const MAX_TIME: Duration = Duration::from_secs(24 * 3600);

/// Rules, and the addresses that names have had in answers to the guest.
pub(crate) struct Policy {
    /// Those that allow, and then those that deny.
    rules: Vec<Rule>,
    allow_count: usize,
    /// Until when a rule by name is about an address.
    named: HashMap<(usize, IpAddr), Instant>,
}

impl Policy {
    pub(crate) fn new(allow: &[Rule], deny: &[Rule]) -> Policy {
        Policy {
            rules: [allow, deny].concat(),
            allow_count: allow.len(),
            named: HashMap::new(),
        }
    }

    /// Whether the guest may reach `port` of `address`, or with `None` what has no ports.
    pub(crate) fn permits(&self, address: IpAddr, port: Option<u16>, now: Instant) -> bool {
        let is_about = |index: usize| {
            let rule = &self.rules[index];
            let by_name = || {
                let until = self.named.get(&(index, address));
                until.is_some_and(|until| now < *until)
            };
            rule.has_port(port) && rule.has_address(address).unwrap_or_else(by_name)
        };
        let is_denied = (self.allow_count..self.rules.len()).any(is_about);
        !is_denied && (self.allow_count == 0 || (0..self.allow_count).any(is_about))
    }

    /// Whether answers of name servers matter.
    pub(crate) fn needs_answers(&self) -> bool {
        self.rules.iter().any(Rule::is_of_names)
    }

    /// Takes an answer of a name server to the guest.
    pub(crate) fn learn(&mut self, message: &[u8], now: Instant) {
        if let Some(answer) = dns::read_answer(message) {
            self.learn_addresses(&answer, now);
        }
    }

    fn learn_addresses(&mut self, answer: &Answer, now: Instant) {
        let time = Duration::from_secs(answer.time_to_live.into());
        let until = now + time.clamp(MIN_TIME, MAX_TIME);
        for (index, rule) in self.rules.iter().enumerate() {
            if !rule.has_name(&answer.name) {
                continue;
            }
            for &address in &answer.addresses {
                let key = (index, address.to_canonical());
                if self.named.len() >= MAX_NAMED && !self.named.contains_key(&key) {
                    make_room(&mut self.named, now);
                }
                let known = self.named.entry(key).or_insert(until);
                *known = until.max(*known);
            }
        }
    }
}

/// Removes what is not valid any more, and if that is little, also the quarter that is valid for the shortest
/// time.
fn make_room(named: &mut HashMap<(usize, IpAddr), Instant>, now: Instant) {
    named.retain(|_, until| now < *until);
    let quarter = MAX_NAMED / 4;
    if named.len() > MAX_NAMED - quarter {
        let mut ends: Vec<Instant> = named.values().copied().collect();
        let (_, last, _) = ends.select_nth_unstable(quarter);
        let last = *last;
        named.retain(|_, until| last < *until);
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;
    use crate::dns::tests::answer;

    fn policy(allow: &[&str], deny: &[&str]) -> Policy {
        let rules = |texts: &[&str]| -> Vec<Rule> {
            texts.iter().map(|text| text.parse().unwrap()).collect()
        };
        Policy::new(&rules(allow), &rules(deny))
    }

    fn permits(policy: &Policy, address: &str, port: u16, now: Instant) -> bool {
        policy.permits(address.parse().unwrap(), Some(port), now)
    }

    #[test]
    fn without_rules_everything_is_permitted() {
        let now = Instant::now();
        assert!(permits(&policy(&[], &[]), "192.0.2.1", 80, now));
    }

    #[test]
    fn denying_is_stronger_than_allowing() {
        let now = Instant::now();
        let policy = policy(
            &["192.0.2.0/24", "*:53", "[2001:db8::]/32:443"],
            &["192.0.2.7", "192.0.2.0/25:22"],
        );
        for (address, port, expected) in [
            ("192.0.2.1", 80, true),
            ("192.0.2.1", 22, false),
            ("192.0.2.200", 22, true),
            ("192.0.2.7", 80, false),
            ("192.0.2.7", 53, false),
            ("198.51.100.1", 53, true),
            ("198.51.100.1", 80, false),
            ("2001:db8::5", 443, true),
            ("2001:db8::5", 80, false),
        ] {
            assert_eq!(
                permits(&policy, address, port, now),
                expected,
                "{address}:{port}"
            );
        }
        let ping = |text: &str| policy.permits(text.parse().unwrap(), None, now);
        // Rules with ports are not about pings.
        assert!(ping("192.0.2.1") && !ping("192.0.2.7") && !ping("2001:db8::5"));
    }

    #[test]
    fn answers_open_addresses_for_their_time() {
        let now = Instant::now();
        let mut policy = policy(&["*.example.org:443"], &["bad.example.org"]);
        assert!(policy.needs_answers());
        policy.learn(
            &answer("a.example.org", &[("a.example.org", 60, "192.0.2.1")]),
            now,
        );
        policy.learn(
            &answer("b.example.org", &[("b.example.org", 0, "192.0.2.2")]),
            now,
        );
        policy.learn(
            &answer("bad.example.org", &[("bad.example.org", 60, "192.0.2.3")]),
            now,
        );
        policy.learn(
            &answer("example.net", &[("example.net", 60, "192.0.2.4")]),
            now,
        );
        let at = |seconds| now + Duration::from_secs(seconds);
        for (address, port, time, expected) in [
            ("192.0.2.1", 443, 59, true),
            ("192.0.2.1", 80, 0, false),
            ("192.0.2.1", 443, 60, false),
            ("192.0.2.2", 443, 4, true),
            ("192.0.2.2", 443, 5, false),
            ("192.0.2.3", 443, 0, false),
            ("192.0.2.4", 443, 0, false),
        ] {
            let permitted = permits(&policy, address, port, at(time));
            assert_eq!(permitted, expected, "{address}:{port} after {time} s");
        }
        // A later answer with less time does not take away what an earlier one gave.
        policy.learn(
            &answer("a.example.org", &[("a.example.org", 6, "192.0.2.1")]),
            now,
        );
        assert!(permits(&policy, "192.0.2.1", 443, at(59)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn the_table_is_bounded(
            answers in prop::collection::vec((any::<u16>(), 0u32..100_000), 0..60),
        ) {
            let now = Instant::now();
            let mut policy = policy(&["*.test"], &["*.a.test"]);
            for (first, time_to_live) in answers {
                let addresses = (0..128u32)
                    .map(|number| Ipv4Addr::from_bits(u32::from(first) << 16 | number).into());
                let answer = Answer {
                    name: "b.a.test".to_owned(),
                    addresses: addresses.collect(),
                    time_to_live,
                };
                policy.learn_addresses(&answer, now);
                prop_assert!(policy.named.len() <= MAX_NAMED);
                // What was learned last is known.
                let last = Ipv4Addr::from_bits(u32::from(first) << 16 | 127);
                prop_assert!(policy.named.contains_key(&(1, last.into())));
                prop_assert!(!policy.permits(last.into(), Some(1), now));
            }
        }
    }
}
