//! The store: one SQLite file, `lathe.db`, with one row per machine, and one for the uplink while it is shared; and beside each machine what
//! was measured of it over time ([`Past`]), which is no promise: what is lost of it is measured again; and what people said of its future.
//!
//! Everything that lathed promises is in here before it is acknowledged: WAL with `synchronous=FULL`, one writer thread that owns the
//! connection, one transaction per change. A machine's row carries its state, and a state in between is the intent to finish or undo
//! (see `machines::life`), so there is no second table that could disagree with the first.
//!
//! The file says which schema it has (`user_version`). An older one is migrated after a copy was made beside it; a newer one is refused.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

use rusqlite::{Connection, OpenFlags, Transaction, params};
use tokio::sync::{mpsc, oneshot};

use crate::machines::record::Record;
use crate::machines::uplink::{Phase, Stored};
use crate::problem::Problem;

/// The schema that this build writes.
const SCHEMA_VERSION: i64 = 2;
/// Changes waiting for the writer thread before callers wait.
const QUEUE: usize = 64;
/// How each schema version comes from the one before, from version 0 (an empty file) on.
const MIGRATIONS: [&str; SCHEMA_VERSION as usize] = [
    // `cid` and `address` repeat what is in `record`, for uniqueness' sake.
    "CREATE TABLE machine (
        name    TEXT PRIMARY KEY NOT NULL,
        cid     INTEGER NOT NULL UNIQUE,
        address INTEGER UNIQUE,
        record  TEXT NOT NULL
     ) STRICT, WITHOUT ROWID;
     CREATE TABLE fact (
        key   TEXT PRIMARY KEY NOT NULL,
        value TEXT NOT NULL
     ) STRICT, WITHOUT ROWID;",
    // One row at most. `before` is what was at the device's root: who forgets it cannot put it back, hence the new version.
    "CREATE TABLE uplink (
        one                  INTEGER PRIMARY KEY NOT NULL CHECK (one = 1),
        device               TEXT NOT NULL,
        capacity_bit_per_sec INTEGER NOT NULL,
        before               TEXT NOT NULL,
        phase                TEXT NOT NULL
     ) STRICT;",
];

/// What machines asked for over time, in two parts. It is none of the schema's versions: an earlier release that does not know it loses
/// nothing by that and may still open the file.
const PASTS: &str = "CREATE TABLE IF NOT EXISTS past (
        name  TEXT NOT NULL,
        part  INTEGER NOT NULL,
        bytes BLOB NOT NULL,
        PRIMARY KEY (name, part)
     ) STRICT;
     DELETE FROM past WHERE name NOT IN (SELECT name FROM machine);";

/// Number of the large part.
const WHOLE: i64 = 0;
/// Number of the small part.
const RECENT: i64 = 1;
/// Number of what people said, which an earlier release passes over.
const BY_HAND: i64 = 2;
/// Number of how grants met what was asked for, and of decisions; likewise.
const ACCOUNTS: i64 = 3;
const DECISIONS: i64 = 4;

/// What was measured of one machine over time; see `foresight::kept`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Past {
    /// Its name.
    pub name: String,
    /// The large part; in a change: `None` leaves it.
    pub whole: Option<Vec<u8>>,
    /// The small part; in a change: `None` leaves it.
    pub recent: Option<Vec<u8>>,
    /// What people said of its future, see `foresight::by_hand`; in a change: `None` leaves it.
    pub by_hand: Option<Vec<u8>>,
    /// How its grants met what it asked for, see `machines::sculpt`; in a change: `None` leaves it.
    pub accounts: Option<Vec<u8>>,
    /// What was decided about it; in a change: `None` leaves it.
    pub decisions: Option<Vec<u8>>,
}

/// A change to make durable.
#[derive(Debug)]
pub enum Change {
    /// Inserts a machine whose name must be free.
    Insert(Box<Record>),
    /// Replaces a machine's row.
    Put(Box<Record>),
    /// Removes a machine's row, if it is there.
    Delete(String),
    /// Sets a fact about the host, such as `boot_id`.
    Fact(&'static str, String),
    /// Sets what is known of the shared uplink; `None` forgets it.
    Uplink(Option<Box<Stored>>),
    /// Sets the past of machines; of one that is gone none is kept.
    Pasts(Vec<Past>),
}

struct Job {
    change: Change,
    done: oneshot::Sender<Result<(), Problem>>,
}

/// What is in the store when it is opened.
#[derive(Debug, Default)]
pub struct Contents {
    /// All machines, by name.
    pub machines: Vec<Record>,
    /// Id of the host's boot when lathed last ran.
    pub boot_id: Option<String>,
    /// The uplink that is shared, or was about to be.
    pub uplink: Option<Stored>,
    /// What is known of machines' past.
    pub pasts: Vec<Past>,
}

/// Handle of the writer thread; the thread ends with the last handle.
#[derive(Clone, Debug)]
pub struct Store {
    jobs: mpsc::Sender<Job>,
}

fn failed(what: &str) -> impl Fn(rusqlite::Error) -> Problem + '_ {
    move |cause| Problem { code: "store", ..Problem::internal(format!("the store: {what}"), cause) }
}

impl Store {
    /// Opens or makes the store in `folder`.
    ///
    /// # Errors
    /// `store` when the file cannot be opened, is damaged, or is of a newer lathed.
    pub fn open(folder: &Path) -> Result<(Self, Contents), Problem> {
        let path = folder.join("lathe.db");
        let mut connection = connect(&path)?;
        migrate(&mut connection, &path)?;
        let mut contents = read(&connection)?;
        contents.pasts = pasts(&connection).unwrap_or_else(|problem| {
            tracing::warn!(%problem, "what machines asked for before is not known");
            Vec::new()
        });
        let (jobs, queue) = mpsc::channel(QUEUE);
        thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || write_all(connection, queue))
            .map_err(|cause| Problem::internal("cannot start the store's thread", cause))?;
        Ok((Self { jobs }, contents))
    }

    /// Makes `change` durable; when this returns it survives a power cut.
    ///
    /// # Errors
    /// `store` when it could not be written; then nothing changed.
    pub async fn apply(&self, change: Change) -> Result<(), Problem> {
        let (done, result) = oneshot::channel();
        let gone = || Problem::internal("the store", "its thread is gone");
        self.jobs.send(Job { change, done }).await.map_err(|_| gone())?;
        result.await.map_err(|_| gone())?
    }
}

fn connect(path: &Path) -> Result<Connection, Problem> {
    let opening = format!("cannot open {}", path.display());
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
        | OpenFlags::SQLITE_OPEN_CREATE
        | OpenFlags::SQLITE_OPEN_NO_MUTEX
        | OpenFlags::SQLITE_OPEN_NOFOLLOW;
    let connection = Connection::open_with_flags(path, flags).map_err(failed(&opening))?;
    let pragmas = "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA busy_timeout=2000; \
                   PRAGMA trusted_schema=OFF; PRAGMA locking_mode=EXCLUSIVE;";
    // Takes the exclusive lock now, so that a second lathed fails here and not later.
    let locked =
        connection.execute_batch(pragmas).and_then(|()| connection.execute_batch("BEGIN IMMEDIATE; COMMIT;"));
    locked.map_err(|cause| {
        let busy = cause.sqlite_error_code() == Some(rusqlite::ErrorCode::DatabaseBusy);
        let problem = failed(&opening)(cause);
        if !busy {
            return problem;
        }
        problem
            .detail("is another lathed running with the same state directory?")
            .fix("systemctl status lathed")
    })?;
    Ok(connection)
}

fn migrate(connection: &mut Connection, path: &Path) -> Result<(), Problem> {
    let read = "SELECT user_version FROM pragma_user_version";
    let version: i64 =
        connection.query_row(read, [], |row| row.get(0)).map_err(failed("cannot read its version"))?;
    if version > SCHEMA_VERSION {
        let message = format!(
            "{} has schema {version}, this lathed knows up to {SCHEMA_VERSION}: it was written by a newer lathed",
            path.display()
        );
        return Err(Problem::new(crate::problem::Kind::Internal, "store", message)
            .fix("install the newer release again, or restore the copy lathe.db.schema-*"));
    }
    if version == SCHEMA_VERSION {
        return Ok(());
    }
    if version > 0 {
        back_up(connection, &path.with_extension(format!("db.schema-{version}")))?;
    }
    let transaction = connection.transaction().map_err(failed("cannot migrate"))?;
    for statements in MIGRATIONS.iter().skip(usize::try_from(version).unwrap_or(0)) {
        transaction.execute_batch(statements).map_err(failed("cannot migrate"))?;
    }
    transaction.pragma_update(None, "user_version", SCHEMA_VERSION).map_err(failed("cannot migrate"))?;
    transaction.commit().map_err(failed("cannot migrate"))
}

fn back_up(connection: &Connection, copy: &PathBuf) -> Result<(), Problem> {
    // An unfinished copy of an earlier attempt would make VACUUM INTO fail.
    match fs::remove_file(copy) {
        Err(cause) if cause.kind() != std::io::ErrorKind::NotFound => {
            return Err(Problem::internal(format!("cannot replace {}", copy.display()), cause));
        }
        _ => {}
    }
    let target = copy.to_string_lossy().into_owned();
    connection.execute("VACUUM INTO ?1", [target]).map_err(failed("cannot copy it before migrating"))?;
    Ok(())
}

fn read(connection: &Connection) -> Result<Contents, Problem> {
    let what = "cannot read it";
    let mut statement =
        connection.prepare("SELECT name, record FROM machine ORDER BY name").map_err(failed(what))?;
    let rows = statement
        .query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)))
        .map_err(failed(what))?;
    let mut contents = Contents::default();
    for row in rows {
        let (name, text) = row.map_err(failed(what))?;
        let record = serde_json::from_str(&text)
            .map_err(|cause| Problem::internal(format!("the store: the row of machine {name}"), cause))?;
        contents.machines.push(record);
    }
    let boot_id = connection.query_row("SELECT value FROM fact WHERE key = 'boot_id'", [], |row| row.get(0));
    contents.boot_id = match boot_id {
        Ok(value) => Some(value),
        Err(rusqlite::Error::QueryReturnedNoRows) => None,
        Err(cause) => return Err(failed(what)(cause)),
    };
    contents.uplink = read_uplink(connection)?;
    Ok(contents)
}

fn read_uplink(connection: &Connection) -> Result<Option<Stored>, Problem> {
    let sql = "SELECT device, capacity_bit_per_sec, before, phase FROM uplink";
    let row = connection.query_row(sql, [], |row| {
        Ok((
            row.get::<_, String>(0)?,
            row.get::<_, i64>(1)?,
            row.get::<_, String>(2)?,
            row.get::<_, String>(3)?,
        ))
    });
    let (device, capacity, before, phase) = match row {
        Ok(row) => row,
        Err(rusqlite::Error::QueryReturnedNoRows) => return Ok(None),
        Err(cause) => return Err(failed("cannot read the uplink")(cause)),
    };
    let damaged = |cause: String| Problem::internal("the store: the row of the uplink", cause);
    let before = before.parse().map_err(|cause: lathe_netshape::Error| damaged(cause.to_string()))?;
    let capacity_bit_per_sec =
        u64::try_from(capacity).map_err(|_| damaged(format!("capacity {capacity}")))?;
    let phase = Phase::of_word(&phase).ok_or_else(|| damaged(format!("phase {phase:?}")))?;
    Ok(Some(Stored { device, capacity_bit_per_sec, before, phase }))
}

/// What is known of machines' past. Nothing depends on it.
fn pasts(connection: &Connection) -> Result<Vec<Past>, Problem> {
    let what = "cannot read what machines asked for";
    connection.execute_batch(PASTS).map_err(failed(what))?;
    let sql = "SELECT name, part, bytes FROM past ORDER BY name";
    let mut statement = connection.prepare(sql).map_err(failed(what))?;
    let rows = statement
        .query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?, row.get::<_, Vec<u8>>(2)?)))
        .map_err(failed(what))?;
    let mut pasts: Vec<Past> = Vec::new();
    for row in rows {
        let (name, part, bytes) = row.map_err(failed(what))?;
        if pasts.last().is_none_or(|last| last.name != name) {
            pasts.push(Past { name, ..Past::default() });
        }
        let Some(past) = pasts.last_mut() else { continue };
        match part {
            WHOLE => past.whole = Some(bytes),
            RECENT => past.recent = Some(bytes),
            BY_HAND => past.by_hand = Some(bytes),
            ACCOUNTS => past.accounts = Some(bytes),
            DECISIONS => past.decisions = Some(bytes),
            // Of a later release.
            _ => {}
        }
    }
    Ok(pasts)
}

fn put_pasts(transaction: &Transaction<'_>, pasts: &[Past]) -> rusqlite::Result<usize> {
    let sql = "INSERT INTO past SELECT name, ?2, ?3 FROM machine WHERE name = ?1 \
               ON CONFLICT (name, part) DO UPDATE SET bytes = excluded.bytes";
    let mut statement = transaction.prepare_cached(sql)?;
    let mut changed = 0;
    for past in pasts {
        let parts = [
            (WHOLE, &past.whole),
            (RECENT, &past.recent),
            (BY_HAND, &past.by_hand),
            (ACCOUNTS, &past.accounts),
            (DECISIONS, &past.decisions),
        ];
        for (part, bytes) in parts {
            if let Some(bytes) = bytes {
                changed += statement.execute(params![past.name, part, bytes])?;
            }
        }
    }
    Ok(changed)
}

/// Removes a machine's row, and its past if there is any.
fn delete(transaction: &Transaction<'_>, name: &str) -> rusqlite::Result<usize> {
    // Where there is no such table nothing is in it, and no machine stays for the sake of its past: what is left goes at the next start.
    let _ = transaction.execute("DELETE FROM past WHERE name = ?1", [name]);
    transaction.execute("DELETE FROM machine WHERE name = ?1", [name])
}

fn write_all(mut connection: Connection, mut queue: mpsc::Receiver<Job>) {
    while let Some(job) = queue.blocking_recv() {
        let result = connection
            .transaction()
            .map_err(failed("cannot write"))
            .and_then(|transaction| write(&transaction, &job.change).map(|()| transaction))
            .and_then(|transaction| transaction.commit().map_err(failed("cannot write")));
        // Whoever asked may have gone; the change stands all the same.
        let _ = job.done.send(result);
    }
}

fn write(transaction: &Transaction<'_>, change: &Change) -> Result<(), Problem> {
    let row = |record: &Record| {
        let address = record.net.as_ref().map(|net| net.index as i64);
        serde_json::to_string(record)
            .map(|text| (record.name.clone(), record.cid, address, text))
            .map_err(|cause| Problem::internal(format!("cannot encode machine {}", record.name), cause))
    };
    let changed = match change {
        Change::Insert(record) => {
            let (name, cid, address, text) = row(record)?;
            let sql = "INSERT INTO machine (name, cid, address, record) VALUES (?1, ?2, ?3, ?4)";
            transaction.execute(sql, params![name, cid, address, text])
        }
        Change::Put(record) => {
            let (name, cid, address, text) = row(record)?;
            let sql = "UPDATE machine SET cid = ?2, address = ?3, record = ?4 WHERE name = ?1";
            transaction.execute(sql, params![name, cid, address, text])
        }
        Change::Delete(name) => delete(transaction, name),
        Change::Pasts(pasts) => put_pasts(transaction, pasts),
        Change::Fact(key, value) => {
            let sql = "INSERT INTO fact VALUES (?1, ?2) ON CONFLICT (key) DO UPDATE SET value = ?2";
            transaction.execute(sql, params![key, value])
        }
        Change::Uplink(None) => transaction.execute("DELETE FROM uplink", []),
        Change::Uplink(Some(stored)) => {
            let sql = "INSERT INTO uplink VALUES (1, ?1, ?2, ?3, ?4) ON CONFLICT (one) DO UPDATE SET \
                       device = ?1, capacity_bit_per_sec = ?2, before = ?3, phase = ?4";
            let Stored { device, capacity_bit_per_sec, before, phase } = stored.as_ref();
            let capacity = i64::try_from(*capacity_bit_per_sec).unwrap_or(i64::MAX);
            transaction.execute(sql, params![device, capacity, before.to_string(), phase.word()])
        }
    };
    let changed = changed.map_err(failed("cannot write"))?;
    match change {
        Change::Put(record) if changed != 1 => {
            Err(Problem::internal("the store", format!("machine {} has no row", record.name)))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machines::life::Life;
    use crate::machines::record::tests::record;

    fn reopen(folder: &Path) -> Contents {
        // The writer thread of a dropped store ends when it sees that no handle is left: wait for its lock.
        for _ in 0..500 {
            if let Ok((_store, contents)) = Store::open(folder) {
                return contents;
            }
        }
        panic!("the store stays locked");
    }

    #[tokio::test]
    async fn what_was_acknowledged_is_there_after_a_crash() {
        let folder = tempfile::tempdir().unwrap();
        let (store, contents) = Store::open(folder.path()).unwrap();
        assert!(contents.machines.is_empty());
        let mut machine = record("demo");
        machine.life = Life::Creating;
        store.apply(Change::Insert(Box::new(machine.clone()))).await.unwrap();
        store.apply(Change::Fact("boot_id", "b1".to_owned())).await.unwrap();
        // A crash now: the copy of the files is what a reboot would find, with the writer still holding them open.
        let crashed = tempfile::tempdir().unwrap();
        for name in ["lathe.db", "lathe.db-wal"] {
            fs::copy(folder.path().join(name), crashed.path().join(name)).unwrap();
        }
        let contents = reopen(crashed.path());
        assert_eq!(contents.machines, [machine]);
        assert_eq!(contents.boot_id.as_deref(), Some("b1"));
    }

    #[tokio::test]
    async fn a_write_that_never_committed_leaves_the_old_row() {
        let folder = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(folder.path()).unwrap();
        let machine = record("demo");
        store.apply(Change::Insert(Box::new(machine.clone()))).await.unwrap();
        drop(store);
        let mut crashed = loop {
            if let Ok(connection) = connect(&folder.path().join("lathe.db")) {
                break connection;
            }
        };
        let transaction = crashed.transaction().unwrap();
        let mut changed = machine.clone();
        changed.revision = 9;
        write(&transaction, &Change::Put(Box::new(changed))).unwrap();
        drop(transaction);
        drop(crashed);
        assert_eq!(reopen(folder.path()).machines, [machine]);
    }

    #[tokio::test]
    async fn a_store_of_the_schema_before_is_copied_and_gets_an_uplink() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lathe.db");
        let machine = record("demo");
        {
            let mut earlier = connect(&path).unwrap();
            let transaction = earlier.transaction().unwrap();
            transaction.execute_batch(MIGRATIONS[0]).unwrap();
            transaction.pragma_update(None, "user_version", 1).unwrap();
            write(&transaction, &Change::Insert(Box::new(machine.clone()))).unwrap();
            transaction.commit().unwrap();
        }
        let (store, contents) = Store::open(folder.path()).unwrap();
        assert_eq!((contents.machines, contents.uplink), (vec![machine.clone()], None));
        let copy = Connection::open(folder.path().join("lathe.db.schema-1")).unwrap();
        let count: i64 = copy.query_row("SELECT count(*) FROM machine", [], |row| row.get(0)).unwrap();
        assert_eq!(count, 1, "the copy of what was before");
        let mut stored = Stored {
            device: "eth0".to_owned(),
            capacity_bit_per_sec: 1_000_000_000,
            before: "fq_codel 8001: target 4999 flows 512".parse().unwrap(),
            phase: Phase::Enabling,
        };
        store.apply(Change::Uplink(Some(Box::new(stored.clone())))).await.unwrap();
        stored.phase = Phase::Enabled;
        store.apply(Change::Uplink(Some(Box::new(stored.clone())))).await.unwrap();
        drop(store);
        assert_eq!(reopen(folder.path()).uplink, Some(stored));
        let (store, _) = loop {
            if let Ok(opened) = Store::open(folder.path()) {
                break opened;
            }
        };
        store.apply(Change::Uplink(None)).await.unwrap();
        drop(store);
        assert_eq!(reopen(folder.path()).uplink, None);
    }

    fn past(name: &str, whole: Option<&[u8]>, recent: Option<&[u8]>) -> Past {
        let [whole, recent] = [whole, recent].map(|bytes| bytes.map(<[u8]>::to_vec));
        Past { name: name.to_owned(), whole, recent, ..Past::default() }
    }

    fn rows(folder: &Path) -> i64 {
        let connection = loop {
            if let Ok(connection) = connect(&folder.join("lathe.db")) {
                break connection;
            }
        };
        connection.query_row("SELECT count(*) FROM past", [], |row| row.get(0)).unwrap()
    }

    #[tokio::test]
    async fn a_past_is_kept_with_its_machine_and_goes_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(folder.path()).unwrap();
        let mut other = record("other");
        (other.cid, other.net) = (77, None);
        store.apply(Change::Insert(Box::new(record("demo")))).await.unwrap();
        store.apply(Change::Insert(Box::new(other))).await.unwrap();
        let first = vec![past("demo", Some(b"long"), Some(b"a")), past("other", Some(b"its"), Some(b"own"))];
        store.apply(Change::Pasts(first)).await.unwrap();
        let second = vec![past("demo", None, Some(b"b")), past("stranger", Some(b"x"), Some(b"y"))];
        store.apply(Change::Pasts(second)).await.unwrap();
        drop(store);
        let expected = [past("demo", Some(b"long"), Some(b"b")), past("other", Some(b"its"), Some(b"own"))];
        assert_eq!(reopen(folder.path()).pasts, expected);
        assert_eq!(rows(folder.path()), 4, "none of a machine that is not there");
        let (store, _) = loop {
            if let Ok(opened) = Store::open(folder.path()) {
                break opened;
            }
        };
        store.apply(Change::Delete("demo".to_owned())).await.unwrap();
        drop(store);
        assert_eq!(rows(folder.path()), 2);
    }

    #[tokio::test]
    async fn an_earlier_release_may_have_removed_a_machine_and_left_its_past() {
        let folder = tempfile::tempdir().unwrap();
        drop(Store::open(folder.path()).unwrap());
        let orphan = "INSERT INTO past VALUES ('gone', 0, x'00')";
        loop {
            if let Ok(connection) = connect(&folder.path().join("lathe.db")) {
                connection.execute(orphan, []).unwrap();
                break;
            }
        }
        assert!(reopen(folder.path()).pasts.is_empty());
        assert_eq!(rows(folder.path()), 0);
    }

    #[tokio::test]
    async fn a_past_that_cannot_be_read_stops_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(folder.path()).unwrap();
        store.apply(Change::Insert(Box::new(record("demo")))).await.unwrap();
        drop(store);
        loop {
            if let Ok(connection) = connect(&folder.path().join("lathe.db")) {
                connection.execute_batch("DROP TABLE past; CREATE TABLE past (nonsense TEXT)").unwrap();
                break;
            }
        }
        let contents = reopen(folder.path());
        assert_eq!((contents.machines.len(), contents.pasts.len()), (1, 0));
        let (store, _) = loop {
            if let Ok(opened) = Store::open(folder.path()) {
                break opened;
            }
        };
        assert!(store.apply(Change::Pasts(vec![past("demo", Some(b"x"), None)])).await.is_err());
        store.apply(Change::Delete("demo".to_owned())).await.unwrap();
        drop(store);
        assert!(reopen(folder.path()).machines.is_empty());
    }

    #[tokio::test]
    async fn names_and_context_ids_are_unique() {
        let folder = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(folder.path()).unwrap();
        store.apply(Change::Insert(Box::new(record("a")))).await.unwrap();
        assert!(store.apply(Change::Insert(Box::new(record("a")))).await.is_err());
        assert!(store.apply(Change::Insert(Box::new(record("b")))).await.is_err(), "same cid");
        store.apply(Change::Delete("a".to_owned())).await.unwrap();
        store.apply(Change::Insert(Box::new(record("b")))).await.unwrap();
        assert!(store.apply(Change::Put(Box::new(record("a")))).await.is_err(), "no such row");
    }

    #[tokio::test]
    async fn a_second_lathed_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (_store, _) = Store::open(folder.path()).unwrap();
        let problem = Store::open(folder.path()).unwrap_err();
        assert_eq!(problem.code, "store");
        assert!(problem.detail.contains("another lathed"), "{problem}");
    }

    #[test]
    fn a_newer_schema_is_refused_and_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lathe.db");
        Connection::open(&path).unwrap().pragma_update(None, "user_version", 99).unwrap();
        let problem = Store::open(folder.path()).unwrap_err();
        assert!(problem.message.contains("schema 99"), "{problem}");
    }
}
