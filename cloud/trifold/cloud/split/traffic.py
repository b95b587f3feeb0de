"""How many bytes cross each link, by the wire codec.

The headers of messages, some 60 bytes each, are not counted.
"""

from __future__ import annotations

from typing import Literal

from trifold.shared.bundle.manifest import CodecName
from trifold.shared.model.spec import ModelSpec, Part
from trifold.shared.runtime.codec import ANCHORS, RowCodec

LinkName = Literal["device_edge", "edge_cloud"]


class Traffic(Part):
    """Bytes on one link for a prompt and for each token after it; up is towards the cloud."""

    prompt_up: int
    prompt_down: int
    token_up: int
    token_down: int

    @property
    def prompt(self) -> int:
        return self.prompt_up + self.prompt_down

    @property
    def token(self) -> int:
        return self.token_up + self.token_down


def traffic(spec: ModelSpec, codec: CodecName, prompt: int, *, attends: bool) -> dict[LinkName, Traffic]:
    """A device that attends needs every row of the prompt, one that does not only the last."""
    rows = RowCodec(codec, spec.hidden)
    # Token ids travel as varints of 7 bits a byte; this is the largest id's.
    id_bytes = -(-(spec.vocab - 1).bit_length() // 7)
    token_row = rows.size(1, ANCHORS)
    prompt_down = rows.size(prompt, 0) if attends else rows.size(1, prompt - 1)
    return {
        "device_edge": Traffic(
            prompt_up=id_bytes * prompt, prompt_down=prompt_down, token_up=id_bytes, token_down=token_row
        ),
        "edge_cloud": Traffic(
            prompt_up=rows.size(prompt, 0), prompt_down=prompt_down, token_up=token_row, token_down=token_row
        ),
    }
