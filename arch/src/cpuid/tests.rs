use super::*;
use crate::layout::MAX_VCPUS;
use proptest::prelude::*;

fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function,
        index,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

fn name(text: &[u8; 12]) -> [u32; 3] {
    let word = |at: usize| u32::from_le_bytes(text[at..at + 4].try_into().unwrap());
    [word(0), word(8), word(4)]
}

/// A server of 2 x 28 cores of 2 threads, as an Intel host would show it.
fn intel() -> Vec<kvm_cpuid_entry2> {
    let [ebx, ecx, edx] = name(b"GenuineIntel");
    vec![
        entry(0, 0, [0x1f, ebx, ecx, edx]),
        entry(1, 0, [0x606a6, 0x3740_0800, 0x77fa_3203, 0x1f8b_fbff]),
        entry(4, 0, [0xfc00_4121, 0x02c0_003f, 0x3f, 0]),
        entry(4, 1, [0xfc00_4122, 0x01c0_003f, 0x3f, 0]),
        entry(4, 2, [0xfc00_4143, 0x04c0_003f, 0x3ff, 0]),
        entry(4, 3, [0xfc0f_c163, 0x02c0_003f, 0xdfff, 4]),
        entry(4, 4, [0; 4]),
        entry(0xb, 0, [1, 2, 0x100, 0x37]),
        entry(0xb, 1, [6, 56, 0x201, 0x37]),
        entry(0x1f, 0, [1, 2, 0x100, 0x37]),
        entry(0x4000_0000, 0, [0x4000_0001, 1, 2, 3]),
        entry(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
        entry(0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
        entry(0x8000_0001, 0, [0, 0, 0x121, 0x2c10_0800]),
        entry(0x8000_0008, 0, [0x3039, 0, 0, 0]),
    ]
}

/// A server of 64 cores of 2 threads, as an AMD host would show it.
fn amd() -> Vec<kvm_cpuid_entry2> {
    let [ebx, ecx, edx] = name(b"AuthenticAMD");
    vec![
        entry(0, 0, [0x10, ebx, ecx, edx]),
        entry(1, 0, [0x00a0_0f11, 0x1180_0800, 0xfeda_3203, 0x078b_fbff]),
        entry(0xb, 0, [1, 2, 0x100, 0x11]),
        entry(0x4000_0000, 0, [0x4000_0001, 1, 2, 3]),
        entry(0x8000_0000, 0, [0x8000_0026, ebx, ecx, edx]),
        entry(0x8000_0001, 0, [0x00a0_0f11, 0, 0x0040_03f3, 0x2fd3_fbff]),
        entry(0x8000_0008, 0, [0x3030, 0x7, 0x0001_707f, 0]),
        entry(0x8000_001d, 0, [0x4121, 0x01c0_003f, 0x3f, 0]),
        entry(0x8000_001d, 2, [0x4143, 0x01c0_003f, 0x3ff, 2]),
        entry(0x8000_001d, 3, [0x0003_c163, 0x03c0_003f, 0x7fff, 1]),
        entry(0x8000_001e, 0, [0x11, 0x108, 0x307, 0]),
        entry(0x8000_0026, 0, [1, 2, 0x100, 0x11]),
    ]
}

fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
    let mut found = cpuid
        .as_slice()
        .iter()
        .filter(|entry| entry.function == function && entry.index == index);
    let leaf = *found
        .next()
        .unwrap_or_else(|| panic!("no leaf {function:#x}.{index}"));
    assert!(found.next().is_none(), "two leaves {function:#x}.{index}");
    leaf
}

fn has_leaf(cpuid: &CpuId, function: u32) -> bool {
    cpuid
        .as_slice()
        .iter()
        .any(|entry| entry.function == function)
}

/// `vcpu_count` vCPUs with a core each.
fn cores(vcpu_count: u8) -> Topology {
    Topology {
        vcpu_count,
        smt: false,
    }
}

/// `core_count` cores of two threads each.
fn two_threaded_cores(core_count: u8) -> Topology {
    Topology {
        vcpu_count: 2 * core_count,
        smt: true,
    }
}

fn vendors() -> impl Strategy<Value = Vec<kvm_cpuid_entry2>> {
    prop_oneof![Just(intel()), Just(amd())]
}

proptest! {
    #[test]
    fn topology_is_one_package_of_single_threaded_cores(
        supported in vendors(),
        count in 1..=MAX_VCPUS,
    ) {
        let count_32 = u32::from(count);
        let mut packages = Vec::new();
        let mut ids = Vec::new();
        for index in 0..count {
            let cpuid = vcpu_cpuid(&supported, index, cores(count), true).unwrap();
            let features = leaf(&cpuid, 1, 0);
            let id = features.ebx >> 24;
            prop_assert_eq!(features.ebx >> 16 & 0xff, count_32);
            prop_assert_eq!(features.edx >> 28 & 1 == 1, count > 1);

            let threads = leaf(&cpuid, 0xb, 0);
            let cores = leaf(&cpuid, 0xb, 1);
            let end = leaf(&cpuid, 0xb, 2);
            prop_assert_eq!((threads.eax, threads.ebx, threads.ecx), (0, 1, 0x100));
            prop_assert_eq!((cores.ebx, cores.ecx), (count_32, 0x201));
            prop_assert_eq!((end.ebx, end.ecx), (0, 2));
            for level in [threads, cores, end] {
                prop_assert_eq!(level.edx, id);
                prop_assert_eq!(level.flags, KVM_CPUID_FLAG_SIGNIFCANT_INDEX);
            }
            prop_assert!(1 << cores.eax >= count_32);
            prop_assert!(cores.eax == 0 || 1 << (cores.eax - 1) < count_32);
            packages.push(id >> cores.eax);
            ids.push(id);
        }
        prop_assert_eq!(ids, (0..count_32).collect::<Vec<_>>());
        prop_assert!(packages.iter().all(|&package| package == 0));
    }

    #[test]
    fn intel_caches_are_shared_by_the_cores_of_the_package(count in 1..=MAX_VCPUS) {
        let cpuid = vcpu_cpuid(&intel(), 0, cores(count), true).unwrap();
        let id_space = u32::from(count).next_power_of_two();
        for (index, sharers) in [(0, 1), (1, 1), (2, 1), (3, id_space)] {
            let cache = leaf(&cpuid, 4, index);
            prop_assert_eq!((cache.eax >> 14 & 0xfff) + 1, sharers);
            prop_assert_eq!((cache.eax >> 26) + 1, id_space);
            let host = intel()[2 + index as usize];
            prop_assert_eq!(cache.eax & 0x3fff, host.eax & 0x3fff);
            prop_assert_eq!((cache.ebx, cache.ecx, cache.edx), (host.ebx, host.ecx, host.edx));
        }
        prop_assert_eq!(leaf(&cpuid, 4, 4).eax, 0);
        prop_assert_eq!(leaf(&cpuid, 0x1f, 1).eax, leaf(&cpuid, 0xb, 1).eax);
        prop_assert_eq!(leaf(&cpuid, 0x8000_0008, 0).ecx, 0);
    }

    #[test]
    fn amd_leaves_agree_with_the_topology(
        (count, index) in (1..=MAX_VCPUS).prop_flat_map(|count| (Just(count), 0..count)),
    ) {
        let cpuid = vcpu_cpuid(&amd(), index, cores(count), true).unwrap();
        let id = u32::from(index);
        let sizes = leaf(&cpuid, 0x8000_0008, 0);
        prop_assert_eq!((sizes.ecx & 0xff) + 1, u32::from(count));
        prop_assert_eq!(sizes.ecx >> 12 & 0xf, leaf(&cpuid, 0xb, 1).eax);
        prop_assert_eq!(sizes.ecx >> 16, 1, "what is not topology stays");
        prop_assert_eq!(leaf(&cpuid, 0x8000_0001, 0).ecx >> 1 & 1 == 1, count > 1);
        for (cache, sharers) in [(0, 1), (2, 1), (3, u32::from(count))] {
            prop_assert_eq!((leaf(&cpuid, 0x8000_001d, cache).eax >> 14) + 1, sharers);
        }
        let ids = leaf(&cpuid, 0x8000_001e, 0);
        prop_assert_eq!((ids.eax, ids.ebx, ids.ecx), (id, id, 0));
        prop_assert!(!has_leaf(&cpuid, 0x8000_0026));
    }

    #[test]
    fn with_smt_neighbours_are_the_threads_of_a_core(
        supported in vendors(),
        core_count in 1..=MAX_VCPUS / 2,
    ) {
        let count = 2 * u32::from(core_count);
        for index in 0..2 * core_count {
            let cpuid = vcpu_cpuid(&supported, index, two_threaded_cores(core_count), true).unwrap();
            let id = u32::from(index);
            let features = leaf(&cpuid, 1, 0);
            prop_assert_eq!((features.ebx >> 24, features.ebx >> 16 & 0xff), (id, count));
            prop_assert_eq!(features.edx >> 28 & 1, 1);

            let functions = if has_leaf(&cpuid, 0x1f) { vec![0xb, 0x1f] } else { vec![0xb] };
            for function in functions {
                let threads = leaf(&cpuid, function, 0);
                let cores = leaf(&cpuid, function, 1);
                prop_assert_eq!((threads.eax, threads.ebx, threads.ecx), (1, 2, 0x100));
                prop_assert_eq!((cores.ebx, cores.ecx), (count, 0x201));
                prop_assert!(1 << cores.eax >= count && 1 << (cores.eax - 1) < count);
                prop_assert_eq!((threads.edx, cores.edx), (id, id));
            }
        }
    }

    #[test]
    fn threads_share_the_caches_of_a_core_on_intel(core_count in 1..=MAX_VCPUS / 2) {
        let cpuid = vcpu_cpuid(&intel(), 0, two_threaded_cores(core_count), true).unwrap();
        let core_ids = u32::from(core_count).next_power_of_two();
        for (index, sharers) in [(0, 2), (1, 2), (2, 2), (3, 2 * core_ids)] {
            let cache = leaf(&cpuid, 4, index);
            prop_assert_eq!((cache.eax >> 14 & 0xfff) + 1, sharers);
            prop_assert_eq!((cache.eax >> 26) + 1, core_ids);
        }
    }

    #[test]
    fn threads_share_the_caches_of_a_core_on_amd(
        (core_count, index) in
            (1..=MAX_VCPUS / 2).prop_flat_map(|count| (Just(count), 0..2 * count)),
    ) {
        let cpuid = vcpu_cpuid(&amd(), index, two_threaded_cores(core_count), true).unwrap();
        let count = 2 * u32::from(core_count);
        let id = u32::from(index);
        let sizes = leaf(&cpuid, 0x8000_0008, 0);
        prop_assert_eq!((sizes.ecx & 0xff) + 1, count);
        prop_assert_eq!(sizes.ecx >> 12 & 0xf, leaf(&cpuid, 0xb, 1).eax);
        prop_assert_eq!(leaf(&cpuid, 0x8000_0001, 0).ecx >> 1 & 1, 1);
        for (cache, sharers) in [(0, 2), (2, 2), (3, count)] {
            prop_assert_eq!((leaf(&cpuid, 0x8000_001d, cache).eax >> 14) + 1, sharers);
        }
        let ids = leaf(&cpuid, 0x8000_001e, 0);
        prop_assert_eq!((ids.eax, ids.ebx & 0xff, ids.ebx >> 8 & 0xff), (id, id / 2, 1));
        prop_assert_eq!(ids.ecx, 0);
        prop_assert!(!has_leaf(&cpuid, 0x8000_0026));
    }

    #[test]
    fn any_host_leaves_yield_a_table(
        leaves in prop::collection::vec((any::<u32>(), 0..4_u32, any::<[u32; 4]>()), 0..300),
        index: u8,
        vcpu_count: u8,
        smt: bool,
    ) {
        let supported: Vec<_> = leaves
            .into_iter()
            .map(|(function, index, registers)| entry(function & 0x8000_003f, index, registers))
            .collect();
        let possible = (1..=MAX_VCPUS).contains(&vcpu_count)
            && index < vcpu_count
            && (!smt || vcpu_count == 1 || vcpu_count % 2 == 0);
        match vcpu_cpuid(&supported, index, Topology { vcpu_count, smt }, false) {
            Ok(_) => prop_assert!(possible),
            Err(Error::CpuidTooLong { count, .. }) => prop_assert!(count > 256),
            Err(_) => prop_assert!(!possible),
        }
    }
}

#[test]
fn features_stay_as_kvm_gave_them() {
    let cpuid = vcpu_cpuid(&intel(), 0, cores(2), true).unwrap();
    let features = leaf(&cpuid, 1, 0);
    assert_eq!(features.eax, 0x606a6);
    assert_eq!(features.ebx & 0xffff, 0x0800);
    assert_eq!(features.ecx, 0x77fa_3203 | 1 << 24 | 1 << 31);
    assert_eq!(features.edx, 0x1f8b_fbff | 1 << 28);
    for function in [0x4000_0000, 0x4000_0001, 0x8000_0001] {
        let host = *intel()
            .iter()
            .find(|entry| entry.function == function)
            .unwrap();
        assert_eq!(leaf(&cpuid, function, 0), host);
    }
}

#[test]
fn deadline_timer_is_offered_only_when_kvm_has_it() {
    for offered in [false, true] {
        let cpuid = vcpu_cpuid(&amd(), 0, cores(1), offered).unwrap();
        assert_eq!(leaf(&cpuid, 1, 0).ecx >> 24 & 1 == 1, offered);
    }
}

#[test]
fn processors_without_a_leaf_do_not_get_it() {
    let cpuid = vcpu_cpuid(&amd(), 0, cores(4), true).unwrap();
    assert!(!has_leaf(&cpuid, 0x1f));

    let mut old = amd();
    old[0].eax = 0xa;
    for entry in &mut old {
        if entry.function == 0x8000_0001 {
            entry.ecx &= !(1 << 22);
        }
    }
    old.retain(|entry| entry.function != 0x8000_001e);
    let cpuid = vcpu_cpuid(&old, 0, cores(4), true).unwrap();
    assert!(!has_leaf(&cpuid, 0xb));
    assert!(!has_leaf(&cpuid, 0x8000_001e));
}

#[test]
fn hypercalls_are_hidden_and_other_features_of_kvm_are_not() {
    let mut leaves = intel();
    hide_hypercalls(&mut leaves);
    let hidden = 1 << 7 | 1 << 11 | 1 << 13;
    for (before, after) in intel().iter().zip(&leaves) {
        let mut expected = *before;
        if before.function == KVM_FEATURES {
            assert_ne!(before.eax & hidden, 0);
            expected.eax &= !hidden;
        }
        assert_eq!(*after, expected);
    }
}

#[test]
fn a_single_vcpu_has_its_own_core_even_with_smt() {
    for supported in [intel(), amd()] {
        let smt = Topology {
            vcpu_count: 1,
            smt: true,
        };
        let table = |topology| vcpu_cpuid(&supported, 0, topology, true).unwrap();
        assert_eq!(table(smt).as_slice(), table(cores(1)).as_slice());
    }
}

#[test]
fn a_thread_without_its_neighbour_is_refused() {
    let odd = Topology {
        vcpu_count: 3,
        smt: true,
    };
    let error = vcpu_cpuid(&intel(), 0, odd, true).unwrap_err();
    assert!(matches!(error, Error::UnpairedVcpu { count: 3 }));
}

fn modifier(leaf: u32, subleaf: u32, register: CpuidRegister) -> CpuidModifier {
    CpuidModifier {
        leaf,
        subleaf,
        flags: 0,
        register,
        mask: u32::MAX,
        value: 0,
    }
}

fn registers(entry: &kvm_cpuid_entry2) -> [u32; 4] {
    [entry.eax, entry.ebx, entry.ecx, entry.edx]
}

const REGISTERS: [CpuidRegister; 4] = [
    CpuidRegister::Eax,
    CpuidRegister::Ebx,
    CpuidRegister::Ecx,
    CpuidRegister::Edx,
];

proptest! {
    #[test]
    fn a_modifier_changes_only_the_bits_of_its_mask(
        place in 0..4_usize,
        mask: u32,
        value: u32,
        flags: u32,
    ) {
        let before = vcpu_cpuid(&intel(), 0, cores(1), true).unwrap();
        let mut after = before.clone();
        let modifier = CpuidModifier { flags, mask, value, ..modifier(0x4000_0001, 0, REGISTERS[place]) };
        modify_cpuid(&mut after, &[modifier]).unwrap();
        for (before, after) in before.as_slice().iter().zip(after.as_slice()) {
            let mut expected = *before;
            if before.function == 0x4000_0001 {
                let mut bits = registers(before);
                bits[place] = bits[place] & !mask | value & mask;
                expected = entry(before.function, before.index, bits);
                expected.flags = flags;
            }
            prop_assert_eq!(*after, expected);
        }
    }

    #[test]
    fn the_description_of_one_vcpu_can_be_that_of_all(
        supported in vendors(),
        index in 0..4_u8,
    ) {
        let table = |index| vcpu_cpuid(&supported, index, two_threaded_cores(2), true).unwrap();
        let mut modifiers = Vec::new();
        for leaf in table(0).as_slice() {
            for (register, value) in REGISTERS.into_iter().zip(registers(leaf)) {
                let flags = leaf.flags;
                modifiers.push(CpuidModifier { flags, value, ..modifier(leaf.function, leaf.index, register) });
            }
        }
        let own = table(index);
        let mut modified = own.clone();
        modify_cpuid(&mut modified, &modifiers).unwrap();
        prop_assert_eq!(modified.as_slice(), own.as_slice());
    }
}

#[test]
fn modifiers_are_applied_in_order_to_the_subleaf_they_name() {
    let mut table = vcpu_cpuid(&intel(), 0, cores(1), true).unwrap();
    let set = |value| CpuidModifier {
        mask: 0xff,
        value,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        ..modifier(4, 2, CpuidRegister::Ecx)
    };
    modify_cpuid(&mut table, &[set(1), set(2)]).unwrap();
    assert_eq!(leaf(&table, 4, 2).ecx, 0x302);
    assert_eq!(leaf(&table, 4, 1).ecx, 0x3f);
}

#[test]
fn changing_a_missing_leaf_is_an_error() {
    let mut table = vcpu_cpuid(&intel(), 0, cores(1), true).unwrap();
    for (leaf, subleaf) in [(0x19, 0), (1, 1), (0x8000_001e, 0)] {
        let error = modify_cpuid(&mut table, &[modifier(leaf, subleaf, CpuidRegister::Eax)]);
        let found = matches!(
            error.unwrap_err(),
            Error::NoCpuidLeaf { leaf: l, subleaf: s } if (l, s) == (leaf, subleaf)
        );
        assert!(found, "{leaf:#x}.{subleaf}");
    }
}
