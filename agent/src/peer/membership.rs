//! What makes a host a member: CA, certificates, card, gossip keys; made, issued, stored and loaded here.
//!
//! All keys are Ed25519: one per node for its TLS certificate and its adverts, one for the CA. Certificates do not expire, because a host
//! with a wrong clock must still find its cluster; a member is expelled by changing the gossip key and the CA.

use std::net::IpAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use lathe_gossip::{CaPublicKey, GossipKey, Keyring, NodeCard, SecretKey};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ED25519, PublicKeyData,
};
use ring::rand::{SecureRandom, SystemRandom};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};

use super::error::PeerError;
use super::store::{Store, file};
use super::token::{hex, sha256};

/// Start of the DER of an Ed25519 SubjectPublicKeyInfo (RFC 8410 section 4); 32 bytes of key follow.
const ED25519_SPKI: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// `cluster.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterFile {
    /// Always 1.
    pub schema: u32,
    /// Name of the cluster.
    pub cluster: String,
    /// Where others reach this host.
    pub ip: IpAddr,
    /// The port, if it is not the one listened on (forwarding).
    pub port: Option<u16>,
}

/// Everything that a member holds. Debug shows no secret.
pub struct Membership {
    /// Name, address.
    pub file: ClusterFile,
    /// The CA's certificate.
    pub ca_cert: CertificateDer<'static>,
    /// This node's certificate.
    pub node_cert: CertificateDer<'static>,
    /// This node's card.
    pub card: NodeCard,
    /// The gossip keys.
    pub keys: Keyring,
    node_key: KeyPair,
    ca_key: Option<KeyPair>,
}

impl std::fmt::Debug for Membership {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Membership({} in {})", self.card.name(), self.file.cluster)
    }
}

/// What the CA gives to a new member.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Issued {
    /// Name of the cluster.
    pub cluster: String,
    /// The CA's certificate, PEM.
    pub ca_pem: String,
    /// The new member's certificate, PEM.
    pub node_pem: String,
    /// The new member's card, base64.
    pub card: String,
    /// The gossip keys, base64, the one to send with first. Secret.
    pub gossip_keys: Vec<String>,
}

/// Seconds since 1970, by the host's clock.
pub fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Random bytes from the kernel.
///
/// # Errors
/// [`PeerError::Internal`] if the kernel has none.
pub fn random<const N: usize>() -> Result<[u8; N], PeerError> {
    let mut bytes = [0; N];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| PeerError::Internal("no random bytes from the kernel".into()))?;
    Ok(bytes)
}

/// The name in a node's certificate. The suffix keeps names such as `10.0.0.1` from being taken for addresses.
pub fn certificate_name(node: &str) -> String {
    format!("{node}.lathe")
}

/// A new node key.
///
/// # Errors
/// [`PeerError::Internal`].
pub fn new_key() -> Result<KeyPair, PeerError> {
    KeyPair::generate_for(&PKCS_ED25519).map_err(internal)
}

/// A request for a certificate for this name and key, PEM.
///
/// # Errors
/// [`PeerError::Internal`].
pub fn request(name: &str, key: &KeyPair) -> Result<String, PeerError> {
    let params = CertificateParams::new(vec![certificate_name(name)]).map_err(internal)?;
    params.serialize_request(key).and_then(|request| request.pem()).map_err(internal)
}

impl Membership {
    /// A new cluster with this host as its only member.
    ///
    /// # Errors
    /// [`PeerError::NameInvalid`], [`PeerError::Internal`].
    pub fn found(name: &str, file: ClusterFile) -> Result<Self, PeerError> {
        lathe_gossip::card::check_name(name)?;
        let (ca_key, node_key) = (new_key()?, new_key()?);
        let mut params = CertificateParams::new(Vec::new()).map_err(internal)?;
        params.distinguished_name.push(DnType::CommonName, format!("Lathe cluster {}", file.cluster));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let ca_cert = params.self_signed(&ca_key).map_err(internal)?.der().clone();
        let keys = Keyring::new(GossipKey::new(random()?));
        let (node_cert, card) = certify(name, &request(name, &node_key)?, &ca_cert, &ca_key)?;
        Ok(Self { file, ca_cert, node_cert, card, keys, node_key, ca_key: Some(ca_key) })
    }

    /// What the CA answered, checked against the request: nothing in it is taken on trust but the cluster's name and keys.
    ///
    /// # Errors
    /// What is wrong with the answer, in words.
    pub fn from_issued(
        name: &str,
        issued: &Issued,
        file: ClusterFile,
        node_key: KeyPair,
        pin: &[u8; 32],
    ) -> Result<Self, String> {
        let ca_cert = pem_certificate(&issued.ca_pem)?;
        if sha256(&ca_cert) != *pin {
            return Err("the CA certificate is not the pinned one".into());
        }
        let node_cert = pem_certificate(&issued.node_pem)?;
        let card = decode_card(&issued.card)?;
        card.check(&ca_public_key(&ca_cert)?).map_err(|error| error.to_string())?;
        if card.name() != name || card.public_key()[..] != *node_key.public_key_raw() {
            return Err("the card is of another node".into());
        }
        let keys = decode_keys(&issued.gossip_keys)?;
        Ok(Self { file, ca_cert, node_cert, card, keys, node_key, ca_key: None })
    }

    /// Reads what is stored; `None` if this host is in no cluster.
    ///
    /// # Errors
    /// [`PeerError::Store`].
    pub fn load(store: &Store) -> Result<Option<Self>, PeerError> {
        let Some(file) = store.read_json::<ClusterFile>(file::CLUSTER)? else { return Ok(None) };
        let certificate =
            |name| pem_certificate(&store.need(name)?).map_err(|reason| store.corrupt(name, reason));
        let key =
            |name: &str, text: &str| KeyPair::from_pem(text).map_err(|error| store.corrupt(name, error));
        let card = store.need(file::NODE_CARD)?;
        let keys: Vec<String> = store.read_json(file::GOSSIP_KEYS)?.unwrap_or_default();
        let member = Self {
            file,
            ca_cert: certificate(file::CA_CERT)?,
            node_cert: certificate(file::NODE_CERT)?,
            card: decode_card(card.trim()).map_err(|reason| store.corrupt(file::NODE_CARD, reason))?,
            keys: decode_keys(&keys).map_err(|reason| store.corrupt(file::GOSSIP_KEYS, reason))?,
            node_key: key(file::NODE_KEY, &store.need(file::NODE_KEY)?)?,
            ca_key: store.read(file::CA_KEY)?.map(|text| key(file::CA_KEY, &text)).transpose()?,
        };
        member.check(store)?;
        Ok(Some(member))
    }

    /// Whether the files belong together.
    fn check(&self, store: &Store) -> Result<(), PeerError> {
        let ca = ca_public_key(&self.ca_cert).map_err(|reason| store.corrupt(file::CA_CERT, reason))?;
        self.card.check(&ca).map_err(|reason| store.corrupt(file::NODE_CARD, reason))?;
        if self.node_key.public_key_raw() != self.card.public_key() {
            return Err(store.corrupt(file::NODE_KEY, "not the key that node.card names"));
        }
        if self.ca_key.as_ref().is_some_and(|key| key.public_key_raw() != ca.0) {
            return Err(store.corrupt(file::CA_KEY, "not the key of ca.pem"));
        }
        Ok(())
    }

    /// Stores everything, the mark of membership last.
    ///
    /// # Errors
    /// [`PeerError::Store`]; then this host is still in no cluster.
    pub fn save(&self, store: &Store) -> Result<(), PeerError> {
        // Without one, nothing may be left of an `init` that a crash cut short.
        match &self.ca_key {
            Some(ca_key) => store.write(file::CA_KEY, &ca_key.serialize_pem())?,
            None => store.remove(file::CA_KEY)?,
        }
        store.remove(file::TOKENS)?;
        store.write(file::CA_CERT, &pem(&self.ca_cert))?;
        store.write(file::NODE_KEY, &self.node_key.serialize_pem())?;
        store.write(file::NODE_CERT, &pem(&self.node_cert))?;
        store.write(file::NODE_CARD, &format!("{}\n", BASE64_STANDARD.encode(self.card.encode())))?;
        store.write_json(file::GOSSIP_KEYS, &encode_keys(&self.keys))?;
        store.write_json(file::CLUSTER, &self.file)
    }

    /// Makes a member of whoever holds the key of the request, under this name.
    ///
    /// # Errors
    /// [`PeerError::NoCa`] if the CA's key is not here; [`PeerError::NameInvalid`]; [`PeerError::Internal`] for a bad request.
    pub fn issue(&self, name: &str, request: &str) -> Result<Issued, PeerError> {
        let ca_key =
            self.ca_key.as_ref().ok_or_else(|| PeerError::NoCa { cluster: self.file.cluster.clone() })?;
        let (cert, card) = certify(name, request, &self.ca_cert, ca_key)?;
        Ok(Issued {
            cluster: self.file.cluster.clone(),
            ca_pem: pem(&self.ca_cert),
            node_pem: pem(&cert),
            card: BASE64_STANDARD.encode(card.encode()),
            gossip_keys: encode_keys(&self.keys),
        })
    }

    /// Whether this host can let others in.
    pub fn has_ca(&self) -> bool {
        self.ca_key.is_some()
    }

    /// SHA-256 of the CA's certificate: what tokens pin.
    pub fn pin(&self) -> [u8; 32] {
        sha256(&self.ca_cert)
    }

    /// Names the cluster beyond doubt: first 16 hex digits of the pin.
    pub fn cluster_id(&self) -> String {
        hex(&self.pin()[..8])
    }

    /// The CA's public key.
    ///
    /// # Errors
    /// [`PeerError::Internal`] if the certificate has none of ours.
    pub fn ca_public_key(&self) -> Result<CaPublicKey, PeerError> {
        ca_public_key(&self.ca_cert).map_err(PeerError::Internal)
    }

    /// The node's key for gossip.
    ///
    /// # Errors
    /// [`PeerError::NameInvalid`] if it is not Ed25519.
    pub fn secret(&self) -> Result<SecretKey, PeerError> {
        Ok(SecretKey::from_pkcs8(self.node_key.serialized_der())?)
    }

    /// The node's key for TLS.
    pub fn tls_key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.node_key.serialized_der().to_vec()).into()
    }
}

/// The certificate says only what the CA decides; of the request nothing but the key is used.
fn certify(
    name: &str,
    request: &str,
    ca_cert: &CertificateDer<'_>,
    ca_key: &KeyPair,
) -> Result<(CertificateDer<'static>, NodeCard), PeerError> {
    let parsed = CertificateSigningRequestParams::from_pem(request)
        .map_err(|error| PeerError::Internal(format!("certificate request: {error}")))?;
    let public: [u8; 32] = parsed
        .public_key
        .der_bytes()
        .try_into()
        .map_err(|_| PeerError::Internal("certificate request: the key is not Ed25519".into()))?;
    if parsed.public_key.algorithm() != &PKCS_ED25519 {
        return Err(PeerError::Internal("certificate request: the key is not Ed25519".into()));
    }
    let ca_secret = SecretKey::from_pkcs8(ca_key.serialized_der())?;
    let card = NodeCard::issue(name, public, &ca_secret)?;
    let mut params = CertificateParams::new(vec![certificate_name(name)]).map_err(internal)?;
    params.distinguished_name.push(DnType::CommonName, name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    let issuer = Issuer::from_ca_cert_der(ca_cert, ca_key).map_err(internal)?;
    let certificate = params.signed_by(&parsed.public_key, &issuer).map_err(internal)?;
    Ok((certificate.der().clone(), card))
}

fn internal(error: rcgen::Error) -> PeerError {
    PeerError::Internal(error.to_string())
}

fn pem_certificate(text: &str) -> Result<CertificateDer<'static>, String> {
    CertificateDer::from_pem_slice(text.as_bytes())
        .map_err(|error| format!("not a certificate in PEM: {error}"))
}

fn pem(certificate: &CertificateDer<'_>) -> String {
    let body = BASE64_STANDARD.encode(certificate);
    let lines: Vec<&str> =
        body.as_bytes().chunks(64).filter_map(|line| std::str::from_utf8(line).ok()).collect();
    format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"))
}

/// The key of a certificate that this program made: its SubjectPublicKeyInfo is the only one in it.
fn ca_public_key(certificate: &CertificateDer<'_>) -> Result<CaPublicKey, String> {
    let at = certificate.windows(ED25519_SPKI.len()).position(|part| part == ED25519_SPKI);
    let key =
        at.and_then(|at| certificate.get(at + ED25519_SPKI.len()..)).and_then(<[u8]>::first_chunk::<32>);
    key.map(|key| CaPublicKey(*key)).ok_or_else(|| "the CA's key is not Ed25519".to_owned())
}

fn decode_card(text: &str) -> Result<NodeCard, String> {
    let bytes = BASE64_STANDARD.decode(text).map_err(|error| error.to_string())?;
    NodeCard::decode(&bytes).map_err(|error| error.to_string())
}

fn encode_keys(keys: &Keyring) -> Vec<String> {
    keys.keys().map(|key| BASE64_STANDARD.encode(key.secret_bytes())).collect()
}

fn decode_keys(texts: &[String]) -> Result<Keyring, String> {
    let key = |text: &String| -> Result<GossipKey, String> {
        let bytes = BASE64_STANDARD.decode(text).map_err(|_| "a gossip key is not base64".to_owned())?;
        let bytes: [u8; 32] = bytes.try_into().map_err(|_| "a gossip key is not 32 bytes long".to_owned())?;
        Ok(GossipKey::new(bytes))
    };
    let (first, rest) = texts.split_first().ok_or("no gossip key")?;
    let mut ring = Keyring::new(key(first)?);
    for text in rest {
        if !ring.accept(key(text)?) {
            return Err(format!("more than {} gossip keys", lathe_gossip::seal::MAX_KEYS));
        }
    }
    Ok(ring)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> ClusterFile {
        ClusterFile { schema: 1, cluster: "lab".into(), ip: "10.0.0.1".parse().unwrap(), port: None }
    }

    #[test]
    fn a_membership_survives_storing() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        assert!(Membership::load(&store).unwrap().is_none());
        let made = Membership::found("web-03", file()).unwrap();
        made.save(&store).unwrap();
        let loaded = Membership::load(&store).unwrap().unwrap();
        assert_eq!((loaded.pin(), &loaded.card, &loaded.keys), (made.pin(), &made.card, &made.keys));
        assert!(loaded.has_ca());
        assert!(loaded.card.check(&loaded.ca_public_key().unwrap()).is_ok());
        assert!(!format!("{loaded:?}").contains("PRIVATE"));
        for (name, other) in [
            (file::NODE_CARD, "junk"),
            (file::CA_KEY, &made.node_key.serialize_pem()),
            (file::NODE_KEY, &new_key().unwrap().serialize_pem()),
        ] {
            let good = store.need(name).unwrap();
            store.write(name, other).unwrap();
            let error = Membership::load(&store).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
            store.write(name, &good).unwrap();
        }
    }

    #[test]
    fn nothing_is_left_of_an_init_that_was_cut_short() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        Membership::found("db-02", file()).unwrap().save(&store).unwrap();
        store.remove(file::CLUSTER).unwrap();
        assert!(Membership::load(&store).unwrap().is_none());
        let (ca, key) = (Membership::found("web-03", file()).unwrap(), new_key().unwrap());
        let issued = ca.issue("db-02", &request("db-02", &key).unwrap()).unwrap();
        Membership::from_issued("db-02", &issued, file(), key, &ca.pin()).unwrap().save(&store).unwrap();
        assert!(!Membership::load(&store).unwrap().unwrap().has_ca());
    }

    #[test]
    fn a_new_member_checks_what_it_is_given() {
        let ca = Membership::found("web-03", file()).unwrap();
        let key = new_key().unwrap();
        let issued = ca.issue("db-02", &request("db-02", &key).unwrap()).unwrap();
        let take = |name: &str, issued: &Issued, pin: [u8; 32]| {
            let key = KeyPair::from_pem(&key.serialize_pem()).unwrap();
            Membership::from_issued(name, issued, file(), key, &pin).map(|m| m.has_ca())
        };
        assert_eq!(take("db-02", &issued, ca.pin()), Ok(false));
        assert!(take("db-02", &issued, [0; 32]).unwrap_err().contains("pinned"));
        assert!(take("db-03", &issued, ca.pin()).unwrap_err().contains("another node"));
        let other =
            Membership::found("x", file()).unwrap().issue("db-02", &request("db-02", &key).unwrap()).unwrap();
        assert!(take("db-02", &Issued { card: other.card, ..issued.clone() }, ca.pin()).is_err());
        assert!(take("db-02", &Issued { gossip_keys: vec![], ..issued }, ca.pin()).is_err());
    }

    #[test]
    fn only_sound_requests_are_signed() {
        let ca = Membership::found("web-03", file()).unwrap();
        let ecdsa = KeyPair::generate().unwrap();
        for bad in ["", "junk", &request("x", &ecdsa).unwrap()] {
            let error = ca.issue("x", bad).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains("certificate request"), "{error}");
        }
        assert!(ca.issue("../x", &request("x", &new_key().unwrap()).unwrap()).is_err());
    }
}
