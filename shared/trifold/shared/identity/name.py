"""Who a node is: a name in its certificate, `trifold://TENANT/ROLE/NODE`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal, Self, cast, get_args

from cryptography import x509

from trifold.shared.errors import ConfigError, Unauthenticated

Role = Literal["client", "device", "gateway", "edge", "core", "trainer", "authority"]
"""A client holds no part of the model; a gateway is a device that serves clients; a trainer is a site's."""
ROLES: Final[tuple[Role, ...]] = get_args(Role)

_WORD: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
NAME: Final = re.compile(_WORD)
"""Of a node, a tenant or a site."""
NAME_RULE: Final = "letters, digits, '.', '_' and '-', 64 at most"

_URI: Final = re.compile(rf"trifold://(?P<tenant>{_WORD})/(?P<role>{'|'.join(ROLES)})/(?P<node>{_WORD})")


@dataclass(frozen=True)
class Identity:
    """A node of one tenant; a service may be of several, which are those that it serves."""

    tenants: tuple[str, ...]
    role: Role
    node: str

    def __post_init__(self) -> None:
        """Raises ConfigError for a name that no certificate can carry."""
        for word in (*self.tenants, self.node):
            if not NAME.fullmatch(word):
                raise ConfigError(f"{word!r} is no name: {NAME_RULE}")
        if len(self.tenants) != 1 and (self.role != "core" or not self.tenants):
            raise ConfigError(f"{self.node} must belong to one tenant: only a core may serve several")

    @classmethod
    def of(cls, certificate: x509.Certificate) -> Self:
        """Raises Unauthenticated for a certificate that names no node of Trifold."""
        try:
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
            raise Unauthenticated("the certificate has no name of a node") from None
        found = [_URI.fullmatch(uri) for uri in names.get_values_for_type(x509.UniformResourceIdentifier)]
        matches = [match for match in found if match]
        if (
            not matches
            or len(matches) < len(found)
            or len({match.group("role", "node") for match in matches}) > 1
        ):
            raise Unauthenticated(
                "the certificate does not have one name of a node: trifold://TENANT/ROLE/NODE"
            )
        tenants = tuple(match["tenant"] for match in matches)
        try:
            return cls(tenants, cast(Role, matches[0]["role"]), matches[0]["node"])
        except ConfigError as error:
            raise Unauthenticated(f"the certificate names nobody: {error.message}") from None

    @property
    def uris(self) -> list[str]:
        return [f"trifold://{tenant}/{self.role}/{self.node}" for tenant in self.tenants]

    def __str__(self) -> str:
        return f"trifold://{','.join(self.tenants)}/{self.role}/{self.node}"
