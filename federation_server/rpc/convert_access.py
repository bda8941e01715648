"""What belongs to access, to the contract's messages."""

from __future__ import annotations

from federation.v1 import session_service_pb2
from federation_server.domain.access import IssuedToken
from federation_server.rpc.convert import to_timestamp


def token_to_proto(issued: IssuedToken) -> session_service_pb2.NeuronToken:
    """A neuron's new token."""
    return session_service_pb2.NeuronToken(
        token=issued.token,
        expire_time=to_timestamp(issued.neuron.expire_time),
        refresh_time=to_timestamp(issued.neuron.refresh_time),
    )
