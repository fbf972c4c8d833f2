//! TLS 1.3 between hosts: who is believed on which ground.
//!
//! - A server believes clients whose certificate the cluster's CA signed, and lets others connect too, for joining only
//!   ([`super::api`] sees to that).
//! - A member believes servers whose certificate the CA signed for the name it asked for.
//! - A joiner believes a server that shows the CA certificate whose SHA-256 stands in the token, and a chain from it for the name in
//!   the token.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, OtherError, RootCertStore, ServerConfig,
    SignatureScheme,
};

use super::error::PeerError;
use super::membership::{Membership, certificate_name};
use super::token::sha256;

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn internal(error: impl std::fmt::Display) -> PeerError {
    PeerError::Internal(format!("TLS: {error}"))
}

fn roots(ca: &CertificateDer<'static>) -> Result<Arc<RootCertStore>, Error> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone())?;
    Ok(Arc::new(roots))
}

/// The name under which a node is asked for.
///
/// # Errors
/// [`PeerError::Internal`] if it cannot stand in a certificate.
pub fn server_name(node: &str) -> Result<ServerName<'static>, PeerError> {
    ServerName::try_from(certificate_name(node)).map_err(internal)
}

/// For the peer API's server.
///
/// # Errors
/// [`PeerError::Internal`].
pub fn server(member: &Membership) -> Result<Arc<ServerConfig>, PeerError> {
    let roots = roots(&member.ca_cert).map_err(internal)?;
    let clients = WebPkiClientVerifier::builder_with_provider(roots, provider()).allow_unauthenticated();
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(internal)?
        .with_client_cert_verifier(clients.build().map_err(internal)?)
        .with_single_cert(chain(member), member.tls_key())
        .map_err(internal)?;
    Ok(Arc::new(config))
}

/// For a member's calls to others.
///
/// # Errors
/// [`PeerError::Internal`].
pub fn client(member: &Membership) -> Result<Arc<ClientConfig>, PeerError> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(internal)?
        .with_root_certificates(roots(&member.ca_cert).map_err(internal)?)
        .with_client_auth_cert(chain(member), member.tls_key())
        .map_err(internal)?;
    Ok(Arc::new(config))
}

/// The CA's certificate goes along, so that joiners can compare it with their pin.
fn chain(member: &Membership) -> Vec<CertificateDer<'static>> {
    vec![member.node_cert.clone(), member.ca_cert.clone()]
}

/// For a joiner's one call. The flag tells a wrong pin from other failures.
///
/// # Errors
/// [`PeerError::Internal`].
pub fn joiner(pin: [u8; 32]) -> Result<(Arc<ClientConfig>, Arc<PinVerifier>), PeerError> {
    let verifier = Arc::new(PinVerifier { pin, provider: provider(), mismatch: AtomicBool::new(false) });
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(internal)?
        .dangerous()
        .with_custom_certificate_verifier(verifier.clone())
        .with_no_client_auth();
    Ok((Arc::new(config), verifier))
}

/// Believes the CA whose certificate has the pinned hash, and whom it signed.
#[derive(Debug)]
pub struct PinVerifier {
    pin: [u8; 32],
    provider: Arc<CryptoProvider>,
    mismatch: AtomicBool,
}

impl PinVerifier {
    /// Whether a server showed no certificate with the pinned hash.
    pub fn mismatch(&self) -> bool {
        self.mismatch.load(Ordering::Relaxed)
    }
}

#[derive(Debug, thiserror::Error)]
#[error("no certificate with the pinned hash")]
struct NotPinned;

impl ServerCertVerifier for PinVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Some(ca) = intermediates.iter().find(|certificate| sha256(certificate) == self.pin) else {
            self.mismatch.store(true, Ordering::Relaxed);
            return Err(CertificateError::Other(OtherError(Arc::new(NotPinned))).into());
        };
        let chain = WebPkiServerVerifier::builder_with_provider(
            roots(&ca.clone().into_owned())?,
            self.provider.clone(),
        )
        .build()
        .map_err(|error| Error::General(error.to_string()))?;
        chain.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken here".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
