"""repro: does an efficiency paper's claim hold here, and if not, why?

Importing this package imports neither torch nor ray.
"""

from pathlib import Path

__version__ = "0.1.0"

# The links to ../methods and ../kernels get lost in a Windows checkout and in some archives.
if not (Path(__file__).parent / "methods").is_dir():
    __path__.append(str(Path(__file__).parents[1]))
