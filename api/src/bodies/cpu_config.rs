//! `/cpu-config`: changes to the vCPUs that KVM creates (custom CPU templates).

use bantam_vmm::config::{CpuModifiers, CpuidModifier, CpuidRegister, MsrModifier};
use serde::{Deserialize, Serialize};

use crate::fault::Fault;
use crate::text::printable;

/// Body of `PUT /cpu-config`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    /// Capabilities that KVM must have.
    #[serde(default)]
    pub kvm_capabilities: Vec<KvmCapability>,
    /// Changes to CPUID.
    #[serde(default)]
    pub cpuid_modifiers: Vec<CpuidLeaf>,
    /// Changes to model-specific registers.
    #[serde(default)]
    pub msr_modifiers: Vec<Msr>,
    /// Changes to registers of Arm processors. It has to be empty.
    #[serde(default, skip_serializing)]
    pub reg_modifiers: Vec<serde_json::Value>,
    /// Features of Arm processors. It has to be empty.
    #[serde(default, skip_serializing)]
    pub vcpu_features: Vec<serde_json::Value>,
}

/// Changes to one leaf of CPUID.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidLeaf {
    /// The leaf.
    pub leaf: Number,
    /// The subleaf, zero for a leaf without subleaves.
    pub subleaf: Number,
    /// Flags of the leaf (KVM API, `KVM_SET_CPUID2`).
    pub flags: u32,
    /// Changes to its registers, at least one.
    pub modifiers: Vec<Register>,
}

/// A change to one register of a leaf of CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Register {
    /// Which register.
    #[serde(with = "RegisterName")]
    pub register: CpuidRegister,
    /// The change.
    pub bitmap: Bitmap<32>,
}

/// Names of [`CpuidRegister`]s.
#[derive(Serialize, Deserialize)]
#[serde(remote = "CpuidRegister", rename_all = "lowercase")]
enum RegisterName {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A change to a model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Msr {
    /// Its number.
    pub addr: Number,
    /// The change.
    pub bitmap: Bitmap<64>,
}

impl CpuConfig {
    /// Checks that x86-64 has what it changes, and that this host can change it.
    pub(crate) fn check(&self) -> Result<(), Fault> {
        for (what, list) in [
            ("reg_modifiers", &self.reg_modifiers),
            ("vcpu_features", &self.vcpu_features),
        ] {
            if !list.is_empty() {
                return Err(Fault::Value {
                    what,
                    reason: "x86-64 has none; leave the list empty".to_string(),
                });
            }
        }
        let invalid = |reason| Fault::Value {
            what: "cpuid_modifiers",
            reason,
        };
        let mut leaves = self.cpuid_modifiers.iter();
        if leaves.any(|leaf| leaf.modifiers.is_empty()) {
            return Err(invalid("a leaf changes no register".to_string()));
        }
        let checked = self.modifiers().check_host();
        checked.map_err(|error| invalid(error.to_string()))?;
        Ok(())
    }

    /// The changes that it makes.
    pub(crate) fn modifiers(&self) -> CpuModifiers {
        let required = self.kvm_capabilities.iter().filter(|it| it.required);
        CpuModifiers {
            cpuid: self
                .cpuid_modifiers
                .iter()
                .flat_map(CpuidLeaf::modifiers)
                .collect(),
            msrs: self.msr_modifiers.iter().map(Msr::modifier).collect(),
            required_capabilities: required.map(|it| it.number).collect(),
        }
    }
}

impl CpuidLeaf {
    fn modifiers(&self) -> impl Iterator<Item = CpuidModifier> {
        self.modifiers.iter().map(|change| CpuidModifier {
            leaf: self.leaf.0,
            subleaf: self.subleaf.0,
            flags: self.flags,
            register: change.register,
            // A bitmap of 32 bits has no others.
            mask: change.bitmap.mask as u32,
            value: change.bitmap.value as u32,
        })
    }
}

impl Msr {
    fn modifier(&self) -> MsrModifier {
        MsrModifier {
            index: self.addr.0,
            mask: self.bitmap.mask,
            value: self.bitmap.value,
        }
    }
}

/// A capability of KVM by its number (KVM API, `KVM_CHECK_EXTENSION`). As text it is `121`, or `!121` if it
/// is not required.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KvmCapability {
    /// Its number.
    pub number: u32,
    /// Whether the machine must not start without it.
    pub required: bool,
}

impl TryFrom<String> for KvmCapability {
    type Error = String;

    fn try_from(text: String) -> Result<KvmCapability, String> {
        let optional = text.strip_prefix('!');
        let number = parse_digits(optional.unwrap_or(&text), 10).ok_or_else(|| {
            let text = printable(&text);
            format!("invalid capability '{text}': expected its number, such as 121, or !121")
        })?;
        Ok(KvmCapability {
            number,
            required: optional.is_none(),
        })
    }
}

impl From<KvmCapability> for String {
    fn from(capability: KvmCapability) -> String {
        let mark = if capability.required { "" } else { "!" };
        format!("{mark}{}", capability.number)
    }
}

/// A number as text: hexadecimal after `0x`, binary after `0b`, and decimal otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Number(pub u32);

impl TryFrom<String> for Number {
    type Error = String;

    fn try_from(text: String) -> Result<Number, String> {
        let number = if let Some(digits) = text.strip_prefix("0x") {
            parse_digits(digits, 16)
        } else if let Some(digits) = text.strip_prefix("0b") {
            parse_digits(digits, 2)
        } else {
            parse_digits(&text, 10)
        };
        number.map(Number).ok_or_else(|| {
            let text = printable(&text);
            format!("invalid number '{text}': expected one of 32 bits, such as 0x1f, 0b11111 or 31")
        })
    }
}

impl From<Number> for String {
    fn from(number: Number) -> String {
        format!("{:#x}", number.0)
    }
}

/// Parses digits like `from_str_radix`, but refuses a sign.
fn parse_digits(digits: &str, radix: u32) -> Option<u32> {
    let signed = digits.starts_with('+');
    u32::from_str_radix(digits, radix).ok().filter(|_| !signed)
}

/// A change to the bits of a register. As text it is `0b` and then, from the highest bit on, the new digit of
/// each bit that is set, and `x` for each bit that stays. Bits that are left out at the front stay, and
/// underscores may separate digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Bitmap<const BITS: u32> {
    mask: u64,
    value: u64,
}

impl<const BITS: u32> TryFrom<String> for Bitmap<BITS> {
    type Error = String;

    fn try_from(text: String) -> Result<Bitmap<BITS>, String> {
        let parse = || {
            let mut bitmap = Bitmap { mask: 0, value: 0 };
            let mut count = 0;
            for digit in text.strip_prefix("0b")?.chars().filter(|&c| c != '_') {
                let (mask, value) = match digit {
                    '0' => (1, 0),
                    '1' => (1, 1),
                    'x' => (0, 0),
                    _ => return None,
                };
                bitmap.mask = bitmap.mask << 1 | mask;
                bitmap.value = bitmap.value << 1 | value;
                count += 1;
            }
            (1..=BITS).contains(&count).then_some(bitmap)
        };
        parse().ok_or_else(|| {
            let text = printable(&text);
            format!("invalid bitmap '{text}': expected 0b and up to {BITS} digits of 0, 1 and x")
        })
    }
}

impl<const BITS: u32> From<Bitmap<BITS>> for String {
    fn from(bitmap: Bitmap<BITS>) -> String {
        let digit = |bit| match (bitmap.mask >> bit & 1, bitmap.value >> bit & 1) {
            (0, _) => 'x',
            (_, 0) => '0',
            _ => '1',
        };
        let digits: String = (0..BITS).rev().map(digit).collect();
        format!("0b{digits}")
    }
}

#[cfg(test)]
mod tests {
    use bantam_vmm::host::{Virtualization, virtualization};
    use proptest::prelude::*;

    use super::*;
    use crate::json::parse_json;

    /// Reads a text, and returns how the value is written.
    fn read<T: TryFrom<String, Error = String> + Into<String>>(
        text: &str,
    ) -> Result<String, String> {
        T::try_from(text.to_string()).map(Into::into)
    }

    #[test]
    fn a_configuration_becomes_the_modifiers_that_it_names() {
        let text = r#"{
            "kvm_capabilities": ["121", "!56"],
            "cpuid_modifiers": [{"leaf": "0x80000001", "subleaf": "0b0", "flags": 1, "modifiers": [
                {"register": "ecx", "bitmap": "0b1xxx_xxxx_xxxx_xxxx_xxxx_xxxx_xxxx_xx10"},
                {"register": "eax", "bitmap": "0b01"}
            ]}],
            "msr_modifiers": [{"addr": "266", "bitmap": "0b10x"}]
        }"#;
        let config: CpuConfig = parse_json(text.as_bytes()).unwrap();
        let change = |register, mask, value| CpuidModifier {
            leaf: 0x8000_0001,
            subleaf: 0,
            flags: 1,
            register,
            mask,
            value,
        };
        let expected = CpuModifiers {
            cpuid: vec![
                change(CpuidRegister::Ecx, 0x8000_0003, 0x8000_0002),
                change(CpuidRegister::Eax, 3, 1),
            ],
            msrs: vec![MsrModifier {
                index: 0x10a,
                mask: 6,
                value: 4,
            }],
            required_capabilities: vec![121],
        };
        assert_eq!(config.modifiers(), expected);
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(parse_json::<CpuConfig>(text.as_bytes()).unwrap(), config);
    }

    #[test]
    fn what_is_wrong_is_said_with_field_and_place() {
        for (text, message) in [
            (
                r#"{"cpuid_modifiers": [{"leaf": "0xg"}]}"#,
                "cpuid_modifiers[0].leaf: invalid number '0xg': expected one of 32 bits, such as \
                 0x1f, 0b11111 or 31 at line 1 column ",
            ),
            (
                r#"{"cpuid_modifiers": [{"leaf": "1", "subleaf": "0", "flags": 0, "modifiers": [
                    {"register": "ekx"}]}]}"#,
                "cpuid_modifiers[0].modifiers[0].register: unknown variant `ekx`, expected one of \
                 `eax`, `ebx`, `ecx`, `edx` at line 2 column ",
            ),
            (
                r#"{"msr_modifiers": [{"addr": "0x10", "bitmap": "0b2"}]}"#,
                "msr_modifiers[0].bitmap: invalid bitmap '0b2': expected 0b and up to 64 digits of \
                 0, 1 and x at line 1 column ",
            ),
            (
                r#"{"kvm_capabilities": ["KVM_CAP_XCRS"]}"#,
                "kvm_capabilities[0]: invalid capability 'KVM_CAP_XCRS': expected its number, such \
                 as 121, or !121 at line 1 column ",
            ),
        ] {
            let fault = parse_json::<CpuConfig>(text.as_bytes()).unwrap_err();
            let expected = format!("Invalid JSON body: {message}");
            assert!(fault.to_string().starts_with(&expected), "{fault}");
        }
    }

    proptest! {
        #[test]
        fn a_bitmap_is_as_many_digits_as_the_register_has_bits(
            digits in "[01x]{1,32}",
            gap in 0..32_usize,
        ) {
            let expected = format!("0b{digits:x>32}");
            let mut divided = digits;
            divided.insert(gap.min(divided.len()), '_');
            let text = format!("0b{divided}");
            prop_assert_eq!(read::<Bitmap<32>>(&text), Ok(expected.clone()));
            prop_assert_eq!(read::<Bitmap<64>>(&text), Ok(expected.replace("0b", &format!("0b{:x>32}", ""))));
            let (long, bare) = (format!("{expected}0"), &expected[2..]);
            prop_assert!(read::<Bitmap<32>>(&long).is_err());
            prop_assert!(read::<Bitmap<32>>(bare).is_err());
        }

        #[test]
        fn a_number_is_read_in_each_of_its_forms(number: u32) {
            let expected = format!("{number:#x}");
            for text in [expected.clone(), format!("{number:#b}"), number.to_string()] {
                prop_assert_eq!(read::<Number>(&text), Ok(expected.clone()));
            }
            let beyond = u64::from(number) + (1 << 32);
            for text in [format!("{beyond:#x}"), format!("+{number}"), format!("-{number}")] {
                prop_assert!(read::<Number>(&text).is_err(), "{}", text);
            }
        }

        #[test]
        fn a_capability_is_its_number(number: u32) {
            for text in [number.to_string(), format!("!{number}")] {
                prop_assert_eq!(read::<KvmCapability>(&text), Ok(text.clone()));
            }
            let marked_twice = read::<KvmCapability>(&format!("!!{number}"));
            prop_assert!(marked_twice.is_err());
        }

        #[test]
        fn any_text_is_read_or_refused_on_one_line(text in "(0b|0x|!)?[01x_!+\\PC\n]{0,70}") {
            for read in [read::<Bitmap<32>>, read::<Bitmap<64>>, read::<Number>, read::<KvmCapability>] {
                match read(&text) {
                    // The written form reads back as the same value.
                    Ok(written) => prop_assert_eq!(read(&written), Ok(written.clone())),
                    Err(reason) => prop_assert!(!reason.contains('\n'), "{}", reason),
                }
            }
        }
    }

    #[test]
    fn features_of_processors_are_changed_where_the_host_can() {
        let put = |text| {
            let config: CpuConfig = serde_json::from_str(text).unwrap();
            config.check()
        };
        let changes = r#"{"cpuid_modifiers": [{"leaf": "1", "subleaf": "0", "flags": 0,
            "modifiers": [{"register": "ecx", "bitmap": "0b0"}]}]}"#;
        match virtualization() {
            Virtualization::Vmx | Virtualization::Svm => put(changes).unwrap(),
            Virtualization::Pvm | Virtualization::None => {
                let message = put(changes).unwrap_err().to_string();
                let expected =
                    "Invalid cpuid_modifiers: cannot change CPUID: this host has no hardware";
                assert!(message.starts_with(expected), "{message}");
            }
        }
        put(r#"{"msr_modifiers": [{"addr": "0x10a", "bitmap": "0b0"}]}"#).unwrap();
        put(r#"{"reg_modifiers": [], "vcpu_features": []}"#).unwrap();
        for refused in [
            r#"{"reg_modifiers": [{"addr": "0x603000000013c020", "bitmap": "0b0"}]}"#,
            r#"{"vcpu_features": [{"index": 0, "bitmap": "0b0"}]}"#,
            r#"{"cpuid_modifiers": [{"leaf": "1", "subleaf": "0", "flags": 0, "modifiers": []}]}"#,
        ] {
            assert!(put(refused).is_err(), "{refused}");
        }
    }
}
