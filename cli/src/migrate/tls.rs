//! TLS between the two ends of a migration, each of which shows the other a certificate of one authority.
//!
//! The process of the machine neither encrypts nor has a key: it speaks to a socket of this command, which relays what comes
//! there.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, Connection, RootCertStore,
    ServerConfig, ServerConnection,
};

use super::endpoint::TlsPlace;

/// How long a host may take to answer a connection, and then to show its certificate.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
/// How many bytes are relayed at once.
const CHUNK: usize = 64 << 10;

/// The certificate of the authority, by the names of libvirt and of QEMU.
const AUTHORITY: [&str; 2] = ["cacert.pem", "ca-cert.pem"];
/// What a source shows.
const CLIENT: Identity = Identity {
    certificate: ["clientcert.pem", "client-cert.pem"],
    key: ["clientkey.pem", "client-key.pem"],
};
/// What a receiver shows.
const SERVER: Identity = Identity {
    certificate: ["servercert.pem", "server-cert.pem"],
    key: ["serverkey.pem", "server-key.pem"],
};

/// The names of the files with which an end shows who it is.
struct Identity {
    certificate: [&'static str; 2],
    key: [&'static str; 2],
}

/// A connection whose two ends know each other.
pub struct SecureStream {
    connection: Connection,
    stream: TcpStream,
}

/// Reads what a source shows and expects from the files in `folder`.
///
/// # Errors
/// If one of them cannot be used.
pub fn client_config(folder: &Path) -> anyhow::Result<Arc<ClientConfig>> {
    let (certificates, key) = CLIENT.read(folder)?;
    let config = ClientConfig::builder()
        .with_root_certificates(authority(folder)?)
        .with_client_auth_cert(certificates, key);
    let config = config.with_context(|| unusable(&find(folder, CLIENT.certificate)))?;
    Ok(Arc::new(config))
}

/// Reads what a receiver shows and expects from the files in `folder`.
///
/// # Errors
/// If one of them cannot be used.
pub fn server_config(folder: &Path) -> anyhow::Result<Arc<ServerConfig>> {
    let (certificates, key) = SERVER.read(folder)?;
    let verifier = WebPkiClientVerifier::builder(Arc::new(authority(folder)?)).build();
    let verifier = verifier.with_context(|| unusable(&find(folder, AUTHORITY)))?;
    let config = ServerConfig::builder()
        .with_client_cert_verifier(verifier)
        .with_single_cert(certificates, key);
    let config = config.with_context(|| unusable(&find(folder, SERVER.certificate)))?;
    Ok(Arc::new(config))
}

/// Returns the path of a file by the first of its names that is there, or else by the first of them.
fn find(folder: &Path, names: [&str; 2]) -> PathBuf {
    let [first, second] = names.map(|name| folder.join(name));
    match !first.exists() && second.exists() {
        true => second,
        false => first,
    }
}

fn unusable(path: &Path) -> String {
    format!("cannot use '{}' for TLS", path.display())
}

/// Describes why there is nothing of PEM in the file at `path`.
fn unread(error: rustls::pki_types::pem::Error, path: &Path, expected: &str) -> anyhow::Error {
    use rustls::pki_types::pem::Error;
    let error = match error {
        Error::Io(error) => anyhow!(error),
        Error::NoItemsFound => anyhow!("it has no {expected}"),
        other => anyhow!(other),
    };
    error.context(unusable(path))
}

fn certificates(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    let certificates: Vec<_> = read.map_err(|error| unread(error, path, "certificate"))?;
    match certificates.is_empty() {
        true => Err(anyhow!("it has no certificate in PEM format").context(unusable(path))),
        false => Ok(certificates),
    }
}

fn authority(folder: &Path) -> anyhow::Result<RootCertStore> {
    let path = find(folder, AUTHORITY);
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&path)? {
        roots.add(certificate).with_context(|| unusable(&path))?;
    }
    Ok(roots)
}

impl Identity {
    fn read(
        &self,
        folder: &Path,
    ) -> anyhow::Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
        let certificates = certificates(&find(folder, self.certificate))?;
        let path = find(folder, self.key);
        let key = PrivateKeyDer::from_pem_file(&path)
            .map_err(|error| unread(error, &path, "key in PEM format without a passphrase"))?;
        Ok((certificates, key))
    }
}

impl SecureStream {
    /// Connects to a receiver, which has to show a certificate for the host of `place`, and waits until it has accepted that
    /// of this end.
    ///
    /// # Errors
    /// If nobody receives there, it is another host, or it refuses this one.
    pub fn connect(config: Arc<ClientConfig>, place: &TlsPlace) -> anyhow::Result<SecureStream> {
        let name = ServerName::try_from(place.host.clone());
        let name = name.with_context(|| format!("'{}' is not the name of a host", place.host))?;
        let stream = connect_tcp(place).with_context(|| {
            format!("cannot connect to '{place}'; start 'bantam migrate --receive' there first")
        })?;
        let connection = ClientConnection::new(config, name)?;
        let failed = || format!("cannot make a secure connection to '{place}'");
        let mut secure = SecureStream {
            connection: connection.into(),
            stream,
        };
        let greeted = |state: &Connection, received| !state.is_handshaking() && received > 0;
        // In TLS 1.3, the handshake ends at this end before the other has seen its certificate. A receiver greets first.
        secure.exchange(greeted).with_context(failed)?;
        Ok(secure)
    }

    /// Has a source that has connected show who it is.
    ///
    /// # Errors
    /// If it does not.
    pub fn accept(config: Arc<ServerConfig>, stream: TcpStream) -> anyhow::Result<SecureStream> {
        let mut secure = SecureStream {
            connection: ServerConnection::new(config)?.into(),
            stream,
        };
        secure.exchange(|state, _| !state.is_handshaking())?;
        Ok(secure)
    }

    /// Exchanges what TLS has to, until `is_done` says so of the connection and of the length of what has been received.
    fn exchange(&mut self, is_done: impl Fn(&Connection, usize) -> bool) -> anyhow::Result<()> {
        const CLOSED: &str = "it has closed the connection; use tls:// at both ends";
        let SecureStream { connection, stream } = self;
        let deadline = Instant::now() + HANDSHAKE_TIME;
        stream.set_nodelay(true)?;
        let mut received = 0;
        while connection.wants_write() || !is_done(connection, received) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("it has not answered within {HANDSHAKE_TIME:?}");
            }
            let moved = if connection.wants_write() {
                stream.set_write_timeout(Some(left))?;
                connection.write_tls(stream)
            } else {
                stream.set_read_timeout(Some(left))?;
                connection.read_tls(stream)
            };
            match moved {
                Ok(0) => bail!(CLOSED),
                Ok(_) => {}
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => continue,
                    io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => bail!(CLOSED),
                    _ => return Err(error.into()),
                },
            }
            match connection.process_new_packets() {
                Ok(state) => received = state.plaintext_bytes_to_read(),
                Err(error) => {
                    // The other end gets to know why, if it still listens.
                    let _ = connection.write_tls(stream);
                    return Err(explained(error));
                }
            }
        }
        Ok(())
    }

    /// Relays what comes from either end of this and `plain` to the other, until one of them is closed.
    ///
    /// # Errors
    /// If the connection fails, or what was sent has been changed on its way.
    pub fn relay(self, mut plain: UnixStream) -> anyhow::Result<()> {
        let SecureStream {
            mut connection,
            mut stream,
        } = self;
        stream.set_nonblocking(true)?;
        plain.set_nonblocking(true)?;
        let mut chunk = vec![0; CHUNK];
        // `Connection::read_tls` takes only 4 KiB at once, which would be a system call each.
        let mut encrypted = vec![0; CHUNK];
        // More is taken only when all before has been sent.
        connection.set_buffer_limit(None);
        // What is still to be written to `plain`.
        let mut received = Received::default();
        let (mut sends, mut receives) = (true, received.decrypt(&mut connection)?);
        loop {
            let is_sent = !connection.wants_write();
            if (!sends && is_sent) || (!receives && received.is_empty()) {
                return Ok(());
            }
            wait(
                (&stream, receives && received.is_empty(), !is_sent),
                (&plain, sends && is_sent, !received.is_empty()),
            )?;
            if sends && is_sent {
                match ready(plain.read(&mut chunk))? {
                    Some(0) => {
                        sends = false;
                        connection.send_close_notify();
                    }
                    Some(count) => connection
                        .writer()
                        .write_all(chunk.get(..count).unwrap_or_default())?,
                    None => {}
                }
            }
            while connection.wants_write() && ready(connection.write_tls(&mut stream))?.is_some() {}
            while receives
                && received.len() < CHUNK
                && let Some(count) = ready(stream.read(&mut encrypted))?
            {
                let mut encrypted = encrypted.get(..count).unwrap_or_default();
                receives = count > 0;
                while receives && !encrypted.is_empty() {
                    connection.read_tls(&mut encrypted)?;
                    receives = received.decrypt(&mut connection)?;
                }
            }
            if !received.is_empty()
                && let Some(count) = ready(plain.write(received.bytes()))?
            {
                received.consume(count);
            }
        }
    }
}

/// What has been decrypted and not yet passed on.
#[derive(Default)]
struct Received {
    bytes: Vec<u8>,
    passed: usize,
}

impl Received {
    /// Adds what has come. Returns whether more may come.
    fn decrypt(&mut self, connection: &mut Connection) -> anyhow::Result<bool> {
        let state = connection.process_new_packets().map_err(explained)?;
        let start = self.bytes.len();
        self.bytes
            .resize(start + state.plaintext_bytes_to_read(), 0);
        let room = self.bytes.get_mut(start..).unwrap_or_default();
        connection.reader().read_exact(room)?;
        Ok(!state.peer_has_closed())
    }

    fn bytes(&self) -> &[u8] {
        self.bytes.get(self.passed..).unwrap_or_default()
    }

    fn len(&self) -> usize {
        self.bytes.len() - self.passed
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn consume(&mut self, count: usize) {
        self.passed += count;
        if self.is_empty() {
            self.bytes.clear();
            self.passed = 0;
        }
    }
}

fn connect_tcp(place: &TlsPlace) -> io::Result<TcpStream> {
    let mut failed = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    let addresses: Vec<SocketAddr> = (&*place.host, place.port).to_socket_addrs()?.collect();
    for address in addresses {
        match TcpStream::connect_timeout(&address, HANDSHAKE_TIME) {
            Ok(stream) => return Ok(stream),
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

/// Says what is wrong with the other end, and what to do.
fn explained(error: rustls::Error) -> anyhow::Error {
    use CertificateError as Certificate;
    use rustls::Error;
    const SAME_AUTHORITY: &str = "use certificates of one authority at both ends";
    match error {
        Error::InvalidCertificate(Certificate::UnknownIssuer | Certificate::BadSignature) => {
            anyhow!("the authority of this end has not signed its certificate; {SAME_AUTHORITY}")
        }
        Error::InvalidCertificate(
            Certificate::NotValidForName | Certificate::NotValidForNameContext { .. },
        ) => anyhow!(
            "its certificate is for another host; name the host as the certificate does (subjectAltName)"
        ),
        Error::InvalidCertificate(Certificate::Expired | Certificate::ExpiredContext { .. }) => {
            anyhow!("its certificate has expired; renew it")
        }
        Error::InvalidCertificate(
            Certificate::NotValidYet | Certificate::NotValidYetContext { .. },
        ) => anyhow!("its certificate is not valid yet; check the clocks of both hosts"),
        Error::InvalidCertificate(
            Certificate::InvalidPurpose | Certificate::InvalidPurposeContext { .. },
        ) => anyhow!(
            "its certificate is not for this end of a connection; issue one for clients or servers (extendedKeyUsage)"
        ),
        Error::NoCertificatesPresented => {
            anyhow!("it has not shown a certificate; use tls:// with --tls-dir there")
        }
        Error::InvalidMessage(_) => anyhow!("it does not speak TLS; use tls:// at both ends"),
        Error::AlertReceived(AlertDescription::CertificateExpired) => {
            anyhow!("it says that the certificate of this end has expired; renew it")
        }
        Error::AlertReceived(alert) => {
            anyhow!("it refuses the certificate of this end ({alert:?}); {SAME_AUTHORITY}")
        }
        other => anyhow!(other),
    }
}

/// Waits until one of the ends is ready for what is wanted of it: to be read, and to be written.
fn wait(
    (secure, secure_reads, secure_writes): (&TcpStream, bool, bool),
    (plain, plain_reads, plain_writes): (&UnixStream, bool, bool),
) -> io::Result<()> {
    let mut waiting = Vec::with_capacity(2);
    for (descriptor, reads, writes) in [
        (secure.as_fd(), secure_reads, secure_writes),
        (plain.as_fd(), plain_reads, plain_writes),
    ] {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::POLLIN, reads);
        flags.set(PollFlags::POLLOUT, writes);
        // An end that is closed is always ready.
        if !flags.is_empty() {
            waiting.push(PollFd::new(descriptor, flags));
        }
    }
    match poll(&mut waiting, PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Returns what was read or written, or `None` if there is nothing yet.
fn ready(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(count) => Ok(Some(count)),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
