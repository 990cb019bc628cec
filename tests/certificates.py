"""Certificates for tests."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Files:
    """A certificate and its key, as PEM files."""

    certificate: Path
    key: Path

    @property
    def toml(self) -> str:
        """The keys of `[proxy]`."""
        return f'tls_certificate = "{self.certificate}"\ntls_key = "{self.key}"\n'


def certificate(
    folder: Path,
    name: str = "box.test",
    days: float = 90,
    passphrase: bytes | None = None,
    issuer: Files | None = None,
) -> Files:
    """A new one for a host of this name, which ends in so many days.

    It is self-signed, or signed by `issuer`, whose certificate then follows in the file.
    """
    private = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    signer, signed_by, chain = private, subject, b""
    if issuer is not None:
        chain = issuer.certificate.read_bytes()
        signed_by = x509.load_pem_x509_certificate(chain).subject
        loaded = serialization.load_pem_private_key(issuer.key.read_bytes(), None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        signer = loaded
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signed_by)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=30))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(signer, hashes.SHA256())
    )
    files = Files(folder / f"{name}.pem", folder / f"{name}.key")
    pem = serialization.Encoding.PEM
    files.certificate.write_bytes(made.public_bytes(pem) + chain)
    encryption = (
        serialization.NoEncryption()
        if passphrase is None
        else serialization.BestAvailableEncryption(passphrase)
    )
    form = serialization.PrivateFormat.PKCS8
    files.key.write_bytes(private.private_bytes(pem, form, encryption))
    return files
