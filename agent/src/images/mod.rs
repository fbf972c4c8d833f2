//! Files that clients send: images, which are immutable and have a name, and uploads, which a machine is made from.
//!
//! ```text
//! PUT body ─▶ incoming/ID (sparse, hashed, synced) ─▶ rename ─▶ images/NAME/{disk.raw, meta.json}
//!                                                           └▶ uploads/ID
//! ```
//!
//! - [`receive`]: a body becomes a file, bounded by the space that the host can spare
//! - [`mod@format`]: what the bytes are; only raw disks boot
//! - [`store`]: the images
//! - [`uploads`]: the uploads
//! - [`tar`], [`rootfs`]: a root file system made of an archive
//!
//! Nothing is ever visible half written, and nothing that a client names is opened: names are checked, ids are ours. A machine's
//! disk is a private copy, so that an image may be removed at any time.

pub mod format;
pub mod receive;
pub mod rootfs;
pub mod store;
pub mod tar;
pub mod uploads;

pub use store::Images;
pub use uploads::Uploads;
