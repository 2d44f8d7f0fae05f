"""Controls that stand inside text: where an answer begins and ends, a thought, a time."""

from collections.abc import Mapping

import numpy as np


class Marks:
    """The marks that a grammar knows: `controls` names the control of each role in MARKS.

    What is open is a small number: 0 or 1 for the answer, plus 2 for the first block, 4 for the second. An answer holds
    whatever stands outside it; any other block holds text alone, and must end before the document does.
    """

    def __init__(self, controls: Mapping[str, str]):
        self.controls = dict(controls)
        self.roles = tuple(controls)
        blocks = [role for role in controls if f"/{role}" in controls and role != "answer"]
        states = 2 * (1 + len(blocks))
        self.after = np.full((len(controls), states), -1, np.int32)
        """`[marks, open]`: what is open after a mark, -1 where it may not stand."""
        self.in_block = np.arange(states) >= 2
        """`[open]`: whether a block is open."""
        self.end = np.where(self.in_block, 2, 1).astype(np.int32)
        """`[open]`: ids that end the document: EOS, and before it the end of the block."""
        for mark, role in enumerate(controls):
            for state in range(states):
                answer, block = state % 2, state // 2
                if role == "answer" and state == 0:
                    self.after[mark, state] = 1
                elif role == "/answer" and state == 1:
                    self.after[mark, state] = 0
                elif role in blocks and block == 0:
                    self.after[mark, state] = answer + 2 * (1 + blocks.index(role))
                elif role[1:] in blocks and block == 1 + blocks.index(role[1:]):
                    self.after[mark, state] = answer
                elif f"/{role}" not in controls and not role.startswith("/"):
                    self.after[mark, state] = state  # a point
