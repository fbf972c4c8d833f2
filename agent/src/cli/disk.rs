//! `lathe disk`: disks of a machine that are added, grown, listed and removed.

use hyper::Method;
use lathe_shard::Bytes;
use serde::Serialize;

use crate::api::wire::{DiskAddRequest, DiskGrowRequest, DiskList, DiskState, DiskView, PlanView, Removed};
use crate::cli::args::{DiskAddArgs, DiskGrowArgs, DiskRemoveArgs, DiskVerb};
use crate::cli::client::Client;
use crate::cli::machine::{Uploads, disk as source, machine_path, print_plan};
use crate::cli::output::{Table, print, print_json, say};
use crate::cli::{Verdict, exit};
use crate::problem::{Kind, Problem};

/// Disks grow in sectors of this size, bytes.
const SECTOR_BYTES: u64 = 512;

fn disks_path(machine: &str) -> Result<String, Problem> {
    Ok(format!("{}/disks", machine_path(machine)?))
}

fn disk_path(machine: &str, disk: &str) -> Result<String, Problem> {
    let fine = !disk.is_empty()
        && disk.len() <= 64
        && disk.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
    if fine {
        return Ok(format!("{}/{disk}", disks_path(machine)?));
    }
    Err(Problem::new(Kind::BadRequest, "bad-name", format!("`{disk}` cannot be the name of a disk"))
        .detail("names have 1 to 20 of a-z 0-9 -, beginning with a letter")
        .fix(format!("lathe disk list {machine}")))
}

/// `lathe disk …`.
pub async fn disk(client: &Client, json: bool, verb: DiskVerb) -> Verdict {
    match verb {
        DiskVerb::Add(args) => add(client, json, &args).await,
        DiskVerb::List { machine } => list(client, json, &machine).await,
        DiskVerb::Grow(args) => grow(client, json, &args).await,
        DiskVerb::Remove(args) => remove(client, json, &args).await,
    }
}

/// What lathed answers: a plan where that was asked for.
enum Asked {
    Plan(PlanView),
    Disk(DiskView),
}

async fn ask(
    client: &Client,
    method: Method,
    path: &str,
    body: &impl Serialize,
    plan: bool,
) -> Result<Asked, Problem> {
    if plan {
        return client.send(method, &format!("{path}?plan=true"), body, None).await.map(Asked::Plan);
    }
    client.send(method, path, body, None).await.map(Asked::Disk)
}

async fn ask_for_disk(
    uploads: &mut Uploads<'_>,
    client: &Client,
    args: &DiskAddArgs,
) -> Result<Asked, Problem> {
    let path = disks_path(&args.machine)?;
    let source = match &args.file {
        Some(text) => Some(source(uploads, text).await?),
        None => None,
    };
    let request = DiskAddRequest {
        name: args.id.clone(),
        source,
        image: args.image.clone(),
        size_bytes: args.size.map(|Bytes(bytes)| bytes),
        read_only: args.read_only,
    };
    ask(client, Method::POST, &path, &request, args.plan).await
}

async fn add(client: &Client, json: bool, args: &DiskAddArgs) -> Verdict {
    let mut uploads = Uploads::new(client);
    match ask_for_disk(&mut uploads, client, args).await {
        Ok(Asked::Plan(plan)) => {
            uploads.discard().await;
            print_plan(&plan, json, args.exit_code)
        }
        Ok(Asked::Disk(view)) => {
            print_disk(&view, json)?;
            if !json {
                let when = if view.state == DiskState::Attached {
                    "In the guest"
                } else {
                    "In the guest after its next start"
                };
                say(&format!(
                    "{when}: /dev/disk/by-id/virtio-{0}, or the /dev/vd? whose /sys/block/vd?/serial is {0}",
                    view.name
                ));
            }
            Ok(exit::DONE)
        }
        Err(problem) => {
            uploads.discard().await;
            Err(problem)
        }
    }
}

fn print_disk(view: &DiskView, json: bool) -> Result<(), Problem> {
    if json {
        return print_json(view);
    }
    let read_only = if view.read_only { "   read only" } else { "" };
    print(&format!("{}   {}   {}   {}{read_only}\n", view.machine, view.name, size(view), state(view.state)));
    Ok(())
}

fn size(view: &DiskView) -> String {
    view.size_bytes.map(|bytes| Bytes(bytes).to_string()).unwrap_or_default()
}

fn state(state: DiskState) -> &'static str {
    match state {
        DiskState::Attached => "attached",
        DiskState::Detached => "detached",
        DiskState::Adding => "adding",
        DiskState::Removing => "removing",
    }
}

/// One line with the disks of a machine for `lathe show`; empty when it has none.
pub async fn line(client: &Client, machine: &str) -> Result<String, Problem> {
    let list: DiskList = client.get(&disks_path(machine)?).await?;
    Ok(line_of(&list.disks))
}

fn line_of(disks: &[DiskView]) -> String {
    let one = |view: &DiskView| {
        let read_only = if view.read_only { " read only" } else { "" };
        let state = if view.state == DiskState::Attached { "" } else { state(view.state) };
        let wall = if view.wall == "none" { ", wall: none" } else { "" };
        format!("{} {}{read_only} {state}", view.name, size(view)).trim_end().to_owned() + wall
    };
    match disks {
        [] => String::new(),
        disks => format!("disks     {}\n", disks.iter().map(one).collect::<Vec<_>>().join(", ")),
    }
}

async fn list(client: &Client, json: bool, machine: &str) -> Verdict {
    let list: DiskList = client.get(&disks_path(machine)?).await?;
    if json {
        print_json(&list)?;
    } else if list.disks.is_empty() {
        say(&format!("{machine} has no disks. Give it one: lathe disk add {machine} --size 10G"));
    } else {
        print(&table(&list.disks));
    }
    Ok(exit::DONE)
}

fn table(disks: &[DiskView]) -> String {
    let mut table = Table::new(&["NAME", "SIZE", "STATE", "ACCESS", "SOURCE", "PATH"]);
    for disk in disks {
        let access = if disk.read_only { "read only" } else { "read write" };
        let boots = if disk.boots { ", boots" } else { "" };
        table.row(vec![
            disk.name.clone(),
            size(disk),
            state(disk.state).to_owned(),
            access.to_owned(),
            format!("{}{boots}", disk.source),
            disk.path.clone(),
        ]);
    }
    table.render()
}

async fn grow(client: &Client, json: bool, args: &DiskGrowArgs) -> Verdict {
    let path = disk_path(&args.machine, &args.disk)?;
    let list: DiskList = client.get(&disks_path(&args.machine)?).await?;
    let now = list.disks.iter().find(|disk| disk.name == args.disk).and_then(|disk| disk.size_bytes);
    // One that is not there is lathed's to refuse.
    let size = args.size.apply(now.unwrap_or(0), SECTOR_BYTES, |bytes: &Bytes| bytes.0).ok_or_else(|| {
        let message =
            format!("disk {}: the change leads below zero or beyond what can be counted", args.disk);
        Problem::new(Kind::BadRequest, "bad-amount", message)
    })?;
    match ask(client, Method::PATCH, &path, &DiskGrowRequest { size_bytes: size }, args.plan).await? {
        Asked::Plan(plan) => print_plan(&plan, json, args.exit_code),
        Asked::Disk(view) => {
            print_disk(&view, json)?;
            if !json && view.state == DiskState::Attached && Some(size) > now {
                say("Its file system grows by itself only in the guest: resize2fs, xfs_growfs, …");
            }
            Ok(exit::DONE)
        }
    }
}

async fn remove(client: &Client, json: bool, args: &DiskRemoveArgs) -> Verdict {
    let path = disk_path(&args.machine, &args.disk)?;
    let path = format!("{path}?purge={}&timeout_sec={}", args.purge, args.timeout);
    if args.plan {
        let plan: PlanView = client.delete(&format!("{path}&plan=true")).await?;
        return print_plan(&plan, json, args.exit_code);
    }
    let removed: Removed = client.delete(&path).await?;
    if json {
        print_json(&removed)?;
    } else {
        let kept = removed.kept.map(|kept| format!("   data kept in {kept}")).unwrap_or_default();
        print(&format!("{}   {}   removed{kept}\n", args.machine, removed.name));
    }
    Ok(exit::DONE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_a_row() {
        let view = DiskView {
            schema: 1,
            machine: "web".to_owned(),
            name: "data1".to_owned(),
            size_bytes: Some(10 << 30),
            read_only: true,
            boots: false,
            state: DiskState::Detached,
            source: "image tools".to_owned(),
            path: "/x".to_owned(),
            wall: "none".to_owned(),
        };
        let expected = "NAME   SIZE    STATE     ACCESS     SOURCE       PATH\n\
                        data1  10 GiB  detached  read only  image tools  /x\n";
        let attached = DiskView {
            name: "lathe-0".to_owned(),
            state: DiskState::Attached,
            read_only: false,
            wall: "164 iops at 254:0".to_owned(),
            ..view.clone()
        };
        assert_eq!(
            line_of(&[attached, view.clone()]),
            "disks     lathe-0 10 GiB, data1 10 GiB read only detached, wall: none\n"
        );
        assert_eq!(line_of(&[]), "");
        assert_eq!(table(&[view]), expected);
    }

    #[test]
    fn names_that_would_change_the_path_are_refused() {
        assert_eq!(disk_path("web", "data1").unwrap(), "/v1/machines/web/disks/data1");
        for name in ["", "a/b", "..", "a?b", "a b"] {
            assert!(disk_path("web", name).is_err(), "{name}");
        }
    }
}
