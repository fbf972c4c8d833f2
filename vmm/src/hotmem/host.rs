//! The real region: address space of this process, KVM slots, and the map that devices use.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, PoisonError};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use super::{Host, RangeSet};
use crate::memory::{self, MemoryError};
use crate::virtio::Memory;

const OPEN: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
const FLAGS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// See the module.
pub struct Mapping {
    vm: Arc<VmFd>,
    memory: Memory,
    /// What devices reach besides the region, in order and below it.
    fixed: Vec<Arc<GuestRegionMmap>>,
    /// The runs that devices reach, by their offset: reused as long as they do not change.
    known: BTreeMap<u64, Arc<GuestRegionMmap>>,
    /// All of the region.
    reserved: Reserved,
    start: u64,
    first_slot: u32,
}

/// Address space that is never unmapped.
struct Reserved(*mut u8);

// SAFETY: the pointer is an address that stays ours for the life of the process; what it may be used for is decided by the owner of
// the `Mapping`, of which there is one.
unsafe impl Send for Reserved {}

fn failed(error: impl ToString) -> io::Error {
    io::Error::other(error.to_string())
}

impl Mapping {
    /// Reserves a region of `bytes` at guest address `start`, above all of `memory`'s regions, whose slots are the first ones of `vm`.
    ///
    /// # Errors
    /// When there is no address space left.
    pub fn new(vm: Arc<VmFd>, memory: Memory, start: u64, bytes: u64) -> Result<Self, MemoryError> {
        let reserved = memory::reserve(bytes)?;
        let mut fixed = Vec::new();
        for region in memory.memory().iter() {
            let copy = GuestRegionMmap::with_arc(region.get_mmap(), region.start_addr());
            let copy = copy.ok_or_else(|| MemoryError::Build("a region overflows".to_owned()))?;
            fixed.push(Arc::new(copy));
        }
        let first_slot = fixed.len() as u32;
        Ok(Self {
            vm,
            memory,
            fixed,
            known: BTreeMap::new(),
            reserved: Reserved(reserved),
            start,
            first_slot,
        })
    }

    fn pointer(&self, range: &Range<u64>) -> *mut u8 {
        self.reserved.0.wrapping_add(range.start as usize)
    }

    fn protect(&mut self, range: &Range<u64>, protection: libc::c_int) -> io::Result<()> {
        let (pointer, length) = (self.pointer(range), (range.end - range.start) as usize);
        // SAFETY: the range lies in the reserved region, as the owner of the trait's contract says. Closing it is sound because
        // devices, which run on the thread that this is called on, look their buffers up again after `publish`.
        let result = unsafe { libc::mprotect(pointer.cast(), length, protection) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    fn set_slot(&mut self, slot: u64, range: &Range<u64>, bytes: u64) -> io::Result<()> {
        let slot = kvm_userspace_memory_region {
            slot: self.first_slot + slot as u32,
            flags: 0,
            guest_phys_addr: self.start + range.start,
            memory_size: bytes,
            userspace_addr: self.pointer(range) as u64,
        };
        // SAFETY: the slot spans a part of the reserved region, which is never unmapped; the guest reaches of it what is open.
        unsafe { self.vm.set_user_memory_region(slot) }.map_err(|e| io::Error::from_raw_os_error(e.errno()))
    }

    fn run(&self, range: &Range<u64>) -> io::Result<Arc<GuestRegionMmap>> {
        let builder = MmapRegionBuilder::<()>::new((range.end - range.start) as usize)
            .with_mmap_prot(OPEN)
            .with_mmap_flags(FLAGS);
        // SAFETY: the range lies in the reserved region, which is never unmapped, and is open while it is published.
        let builder = unsafe { builder.with_raw_mmap_pointer(self.pointer(range)) };
        let region = builder.build().map_err(failed)?;
        let region = GuestRegionMmap::new(region, GuestAddress(self.start + range.start));
        region.map(Arc::new).ok_or_else(|| failed("a region overflows"))
    }
}

impl Host for Mapping {
    fn open(&mut self, range: &Range<u64>) -> io::Result<()> {
        self.protect(range, OPEN)
    }

    fn close(&mut self, range: &Range<u64>) -> io::Result<()> {
        self.protect(range, libc::PROT_NONE)
    }

    fn discard(&mut self, range: &Range<u64>) -> io::Result<()> {
        let (pointer, length) = (self.pointer(range), (range.end - range.start) as usize);
        // SAFETY: the range lies in the reserved private mapping, and neither devices nor guest reach it any more.
        let result = unsafe { libc::madvise(pointer.cast(), length, libc::MADV_DONTNEED) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    fn add_slot(&mut self, slot: u64, range: &Range<u64>) -> io::Result<()> {
        self.set_slot(slot, range, range.end - range.start)
    }

    fn remove_slot(&mut self, slot: u64) -> io::Result<()> {
        self.set_slot(slot, &(0..0), 0)
    }

    fn publish(&mut self, plugged: &RangeSet) -> io::Result<()> {
        let mut known = BTreeMap::new();
        for range in plugged.runs() {
            let same = self.known.get(&range.start).filter(|run| run.len() == range.end - range.start);
            let run = match same {
                Some(run) => run.clone(),
                None => self.run(&range)?,
            };
            known.insert(range.start, run);
        }
        let regions: Vec<_> = self.fixed.iter().chain(known.values()).cloned().collect();
        let map = GuestMemoryMmap::from_arc_regions(regions).map_err(failed)?;
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).replace(map);
        self.known = known;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hotmem::{BLOCK_BYTES, Region};
    use vm_memory::Bytes;

    const START: u64 = 1 << 32;
    const SLOT: u64 = 128 << 20;

    /// A region on this machine's own KVM, if there is one.
    fn region() -> Option<(Region, Memory)> {
        let system = kvm_ioctls::Kvm::new().ok()?;
        let vm = Arc::new(system.create_vm().ok()?);
        let boot = memory::create(&[(0, 4 << 20)]).unwrap();
        memory::register(&vm, &boot).unwrap();
        let memory = Memory::new(boot);
        let mapping = Mapping::new(vm, memory.clone(), START, 2 * SLOT).unwrap();
        Some((Region::new(2 * SLOT, Box::new(mapping)), memory))
    }

    #[test]
    fn devices_reach_what_is_plugged_and_it_is_empty_when_it_comes_back() {
        let Some((mut region, memory)) = region() else { return println!("skipped: no /dev/kvm") };
        let at = GuestAddress(START + SLOT - 8);
        assert!(memory.memory().write_obj(1u64, at).is_err());
        region.plug(SLOT - BLOCK_BYTES..SLOT).unwrap();
        region.plug(SLOT..SLOT + 2 * BLOCK_BYTES).unwrap();
        assert_eq!(memory.memory().num_regions(), 2, "runs that touch are one");
        memory.memory().write_slice(&[7; 16], at).unwrap();
        region.unplug(&(SLOT - BLOCK_BYTES..SLOT)).unwrap();
        assert!(memory.memory().read_obj::<u64>(at).is_err());
        assert_eq!(memory.memory().read_obj::<u8>(GuestAddress(START + SLOT)).unwrap(), 7);
        region.plug(SLOT - BLOCK_BYTES..SLOT).unwrap();
        assert_eq!(memory.memory().read_obj::<u64>(at).unwrap(), 0);
        region.unplug_all().unwrap();
        assert_eq!((memory.memory().num_regions(), region.plugged_bytes()), (1, 0));
    }

    #[test]
    fn a_vcpu_does_not_reach_closed_memory() {
        let Ok(system) = kvm_ioctls::Kvm::new() else { return println!("skipped: no /dev/kvm") };
        let vm = Arc::new(system.create_vm().unwrap());
        let boot = memory::create(&[(0, 4 << 20)]).unwrap();
        memory::register(&vm, &boot).unwrap();
        // `mov al, [0]` in real mode, with a data segment that begins in the region; `hlt`.
        boot.write_slice(&[0xa0, 0, 0, 0xf4], GuestAddress(0x1000)).unwrap();
        let memory = Memory::new(boot);
        let start = 256 << 20;
        let mapping = Mapping::new(vm.clone(), memory.clone(), start, SLOT).unwrap();
        let mut region = Region::new(SLOT, Box::new(mapping));
        region.plug(0..2 * BLOCK_BYTES).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        let mut run_at = |address: u64| {
            let mut special = vcpu.get_sregs().unwrap();
            (special.cs.base, special.cs.selector) = (0, 0);
            (special.ds.base, special.ds.limit) = (address, u32::MAX);
            vcpu.set_sregs(&special).unwrap();
            let registers = kvm_bindings::kvm_regs { rip: 0x1000, rflags: 2, ..Default::default() };
            vcpu.set_regs(&registers).unwrap();
            match vcpu.run() {
                Ok(kvm_ioctls::VcpuExit::Hlt) => "halted",
                Ok(kvm_ioctls::VcpuExit::MemoryFault { .. }) => "faulted",
                Err(error) if error.errno() == libc::EFAULT => "faulted",
                Ok(kvm_ioctls::VcpuExit::MmioRead(..)) => "nothing there",
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(run_at(start + BLOCK_BYTES), "halted");
        region.unplug(&(BLOCK_BYTES..2 * BLOCK_BYTES)).unwrap();
        assert_eq!(run_at(start), "halted");
        // A KVM that emulates the instruction finds no memory there and asks user space.
        assert!(["faulted", "nothing there"].contains(&run_at(start + BLOCK_BYTES)));
    }
}
