"""Who may call what: the one table of it."""

from __future__ import annotations

from typing import Final

from trifold.shared.errors import ConfigError, Forbidden
from trifold.shared.identity.name import ROLES, Identity, Role

_ALL: Final = frozenset(ROLES)
_TRIFOLD: Final = "/trifold.proto.v1"

ACCESS: Final[dict[str, frozenset[Role]]] = {
    f"{_TRIFOLD}.EdgeService/Session": frozenset({"device", "gateway"}),
    f"{_TRIFOLD}.EdgeService/Describe": _ALL,
    f"{_TRIFOLD}.CoreService/Session": frozenset({"edge"}),
    f"{_TRIFOLD}.CoreService/Describe": _ALL,
    f"{_TRIFOLD}.GenerateService/Generate": frozenset({"client", "device"}),
    f"{_TRIFOLD}.TrainService/Train": frozenset({"trainer"}),
    f"{_TRIFOLD}.TrainService/Describe": _ALL,
    f"{_TRIFOLD}.AuthorityService/Renew": _ALL,
    f"{_TRIFOLD}.AuthorityService/Revoked": _ALL,
    "/grpc.health.v1.Health/Check": _ALL,
    "/grpc.health.v1.Health/Watch": _ALL,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _ALL,
}
"""The roles that may call an RPC, of a tenant that the service serves. What is not here nobody may call."""

SERVED_BY: Final[dict[str, Role]] = {
    "trifold.proto.v1.EdgeService": "edge",
    "trifold.proto.v1.CoreService": "core",
    "trifold.proto.v1.TrainService": "core",
    "trifold.proto.v1.GenerateService": "gateway",
    "trifold.proto.v1.AuthorityService": "authority",
}
"""The role of the nodes that serve a service. Other roles are called by nobody."""


def check_serving(node: Identity, service: str) -> None:
    """Raises ConfigError unless nodes of its role serve `service`, by its full name."""
    if node.role != SERVED_BY[service]:
        serves = f"{service} is served by a node of the role {SERVED_BY[service]}"
        raise ConfigError(f"{serves}, and this is {node}: give another folder with --tls, or enrol one")


def check(caller: Identity, method: str, tenants: frozenset[str] | None) -> None:
    """Raises Forbidden unless the caller may call `method` of a service of these tenants; None is all."""
    if tenants is not None and (len(caller.tenants) != 1 or caller.tenants[0] not in tenants):
        raise Forbidden(f"{caller} is of a tenant that is not served here")
    if caller.role not in ACCESS.get(method, ()):
        raise Forbidden(f"{caller} may not call {method}")
