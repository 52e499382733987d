"""This module holds the names under which full blocks are found again. It does not know the pool or any request.

The name of a block is a SHA-256 over the name of the block before it and its own token ids, so it stands for the whole
prefix and not only for one block. A chain starts from a root that holds the model and the salt: prefixes of two salts
can never have a name in common.
"""

from __future__ import annotations

from hashlib import sha256

__all__ = ["TOKEN_BYTES", "block_digest", "extend_chain", "root_digest"]

TOKEN_BYTES = 4
"""A token id is hashed as the four bytes of an int32."""


def root_digest(model_id: str, salt: str) -> bytes:
    """Return the 32 bytes every chain of this model and salt starts from."""
    model, own = model_id.encode(), salt.encode("utf-8", "surrogatepass")
    # The length comes first, so that no model and salt can be read as another pair.
    return sha256(b"%d:%s%s" % (len(model), model, own)).digest()


def block_digest(parent: bytes, token_bytes: bytes) -> bytes:
    """Return the name of the block that holds these tokens after the prefix named `parent`."""
    return sha256(parent + token_bytes).digest()


def extend_chain(chain: list[bytes], token_bytes: bytes, block_bytes: int) -> None:
    """Append the names of the full blocks that `chain` lacks.

    Args:
        chain: its root, then the names of the blocks hashed so far.
        token_bytes: all tokens of the sequence, from the first on.
        block_bytes: bytes of the tokens of one block.
    """
    for start in range((len(chain) - 1) * block_bytes, len(token_bytes) - block_bytes + 1, block_bytes):
        chain.append(block_digest(chain[-1], token_bytes[start : start + block_bytes]))
