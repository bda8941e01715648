"""TLS on the gRPC port: what gRPC shows in a handshake, asked for anew at every connection.

That a client has a certificate opens the door and no more: who it is, its token or its key says
(`rpc/auth.py`), with TLS as without.
"""

from __future__ import annotations

import grpc

from federation_server.live.certificates import Certificates, TlsMaterial


def server_credentials(certificates: Certificates) -> grpc.ServerCredentials:
    """Credentials for one port, which follow the certificate's files."""
    shown = certificates.renewed()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """What has been renewed since gRPC asked last; None: nothing."""
        nonlocal shown
        newest = certificates.renewed()
        if newest is shown:
            return None  # else gRPC would build a new context for each connection
        shown = newest
        return _configuration(newest)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(shown),
        fetch,  # type: ignore[arg-type]  # its types forget that None is an answer
        require_client_authentication=certificates.files.client_ca is not None,
    )


def _configuration(material: TlsMaterial) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(material.key, material.certificate)], root_certificates=material.client_ca
    )
