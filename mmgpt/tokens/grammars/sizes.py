"""The sizes that an automaton may open: a trie of size strings, and which numbers of frames a clip may end with."""

import numpy as np

NEVER = 1 << 30
"""Room that no generation has."""

SYMBOLS = "0123456789*"
END = len(SYMBOLS)
"""Column of `Sizes.need` for the id that ends a size."""


class Sizes:
    """Tables over size strings. Node 0 is the empty string.

    `child [nodes, 11]` is the node after a symbol, 0 where none is; `done [nodes, 3]` the frames, height and width that
    a node completes; `need [nodes, 12]` the room that a symbol or the size's end takes, so that the picture and EOS
    still fit. `shortest` is the length of the shortest picture, NEVER without any.
    """

    def __init__(self, strings: dict[str, tuple[int, int, int]], lengths: dict[str, int]):
        """`strings` gives the size that each string says, `lengths` the ids of its picture, its places blank."""
        children: list[list[int]] = [[0] * len(SYMBOLS)]
        done, length = [(0, 0, 0)], [NEVER]
        for string, size in strings.items():
            node = 0
            for character in string:
                symbol = SYMBOLS.index(character)
                if not children[node][symbol]:
                    children[node][symbol] = len(children)
                    children.append([0] * len(SYMBOLS))
                    done.append((0, 0, 0))
                    length.append(NEVER)
                node = children[node][symbol]
            done[node], length[node] = size, lengths[string]
        self.child, self.done = np.array(children, np.int32), np.array(done, np.int32)
        self.need, self.shortest = self._needs(length)

    def _needs(self, lengths: list[int]) -> tuple[np.ndarray, int]:
        need = np.full((len(lengths), len(SYMBOLS) + 1), NEVER, np.int32)
        least = list(lengths)  # of the pictures whose sizes go through a node

        def walk(node: int, depth: int) -> None:
            need[node, END] = min(NEVER, lengths[node] - depth)
            for symbol in np.flatnonzero(self.child[node]):
                child = int(self.child[node, symbol])
                walk(child, depth + 1)
                need[node, symbol] = least[child] - depth
                least[node] = min(least[node], least[child])

        walk(0, 0)
        return need, least[0]

    def node(self, string: str) -> int:
        """The node of a beginning of a size; -1 where no size goes on like this."""
        node = 0
        for character in string:
            node = int(self.child[node, SYMBOLS.index(character)])
            if not node:
                return -1
        return node


class Ends:
    """Tables over the frames that a clip without a size has, clipped to the last row.

    `may_end [frames]` whether a clip of so many may end; `planned [frames]` the frames of the shortest clip with at
    least so many, or so many where there is none.
    """

    def __init__(self, frames: set[int]):
        most = max(frames, default=0) + 1
        self.may_end = np.array([n in frames for n in range(most + 1)])
        self.planned = np.array([min((f for f in frames if f >= n), default=n) for n in range(most + 1)], np.int32)
