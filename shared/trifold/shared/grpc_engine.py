"""gRPC's I/O engine, chosen when this module is imported, which must be before gRPC is.

gRPC polls either in threads of its own (the event engine, its default) or where it is called from. With small
messages the first takes two and a half times as long for a round trip: see docs/decisions/0005. What
GRPC_EXPERIMENTS says already is left alone.
"""

from __future__ import annotations

import os

os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
