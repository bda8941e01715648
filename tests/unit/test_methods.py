"""The table of roles names every RPC, and says what the contract says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor

from federation_server.domain.access import Caller
from federation_server.rpc.audit import MUTATIONS, READ_ONLY
from federation_server.rpc.methods import DEREGISTER, METHODS, REGISTER
from tests.support.gate import RPCS

PROTOS = Path(__file__).resolve().parents[2] / "proto"


def comments() -> dict[str, str]:
    """RPC -> its comment in the contract, in one line."""
    found = {}
    for proto in sorted(PROTOS.rglob("*.proto")):
        source = proto.read_text()
        services = list(re.finditer(r"^service (\w+) {", source, re.MULTILINE))
        for rpc in re.finditer(r"((?:^ *//.*\n)+) *rpc (\w+)\(", source, re.MULTILINE):
            service = [start[1] for start in services if start.start() < rpc.start()][-1]
            comment = " ".join(line.strip(" /") for line in rpc[1].splitlines())
            found[f"/federation.v1.{service}/{rpc[2]}"] = comment
    return found


def caller_said(comment: str) -> list[str]:
    roles = re.findall(r"Role: ([A-Z]+)\.", comment)
    words = re.findall(r"Caller: (a neuron|anyone)\b", comment)
    return roles + [{"a neuron": "NEURON", "anyone": "ANYONE"}[word] for word in words]


@pytest.mark.parametrize("rpc", RPCS)
def test_the_table_names_the_rpc(rpc: str) -> None:
    assert rpc in METHODS


def test_the_table_names_nothing_that_is_no_rpc() -> None:
    # Reflection v1 is v1alpha under another name, and has no descriptor of its own here.
    extra = {"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"}
    assert set(METHODS) - set(RPCS) == extra


def test_the_contract_says_of_each_rpc_who_may_call_it_as_the_table_does() -> None:
    said = {rpc: caller_said(comment) for rpc, comment in comments().items()}
    assert said == {
        rpc: [caller.value] for rpc, caller in METHODS.items() if rpc.startswith("/federation.")
    }


def test_only_register_health_and_reflection_need_no_credential() -> None:
    assert {rpc for rpc, caller in METHODS.items() if caller is Caller.ANYONE} == {
        "/federation.v1.SessionService/Register",
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/List",
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    }


def test_every_rpc_for_operators_and_admins_is_in_the_audit_log_or_said_to_change_nothing() -> None:
    theirs = {rpc for rpc, role in METHODS.items() if role in {Caller.OPERATOR, Caller.ADMIN}}
    assert set(MUTATIONS) & READ_ONLY == set()
    assert set(MUTATIONS) | READ_ONLY == theirs | {REGISTER, DEREGISTER}


@pytest.mark.parametrize("rpc", MUTATIONS)
def test_the_audit_log_finds_the_object_in_the_request(rpc: str) -> None:
    subject = MUTATIONS[rpc]
    for path in filter(None, (subject.id_path, subject.neuron_path)):
        message: Any = RPCS[rpc].input_type
        *parents, last = path.split(".")
        for parent in parents:
            message = message.fields_by_name[parent].message_type
        assert message.fields_by_name[last].type == FieldDescriptor.TYPE_STRING
