"""One job a file. `Callback` is what a callback of one's own, outside of this package, derives from."""

from lightning import Callback as Callback
