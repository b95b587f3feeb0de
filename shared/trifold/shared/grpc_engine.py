"""gRPC's I/O engine and how much it logs, chosen when this module is imported, which must be before gRPC is.

gRPC polls either in threads of its own (the event engine, its default) or where it is called from. With small
messages the first takes two and a half times as long for a round trip: see docs/decisions/0005. What
GRPC_EXPERIMENTS says already is left alone. Of its own log only errors are shown, unless GRPC_VERBOSITY says
more: that a handshake failed is told by who wanted the connection.
"""

from __future__ import annotations

import os

os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
