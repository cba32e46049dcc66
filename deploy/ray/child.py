"""A server that ends with whoever started it: child.py FD FLAGS, where FD is the reading end of a pipe that nobody
writes to. It closes when the other end's process is gone, however that came about.

Run by the server's interpreter, which may be another than Ray's, so it imports nothing but jaxserve.
"""

import os
import sys
import threading


def end_with_parent(end: int) -> None:
    os.read(end, 1)
    os._exit(1)  # the engine is this process's child and follows it


if __name__ == "__main__":  # not again in the engine process, which multiprocessing starts from this file
    threading.Thread(target=end_with_parent, args=(int(sys.argv[1]),), daemon=True).start()
    from jaxserve.__main__ import main

    main(sys.argv[2:])
