"""torchrun, for which Ctrl-C is an ordinary way to end, and so is a wrong command line.

torchrun passes the signal on to its workers and waits for them, but then prints its own traceback,
below whatever they had to say. Arguments and all else are torchrun's:

    python examples/launch.py --standalone --nproc-per-node 2 examples/train_gpt.py
"""

import logging
import os
import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    # One thread per rank is torchrun's default too; naming it spares the user a banner.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # "Received 2 death signal", "failed (exitcode: 2)": the workers say it better.
    logging.disable(logging.ERROR)
    try:
        main()
    except SignalException as received:
        sys.exit(128 + received.sigval)
    except ChildFailedError as failed:
        _, first = failed.get_first_failure()
        if first.exitcode != 2:
            raise
        sys.exit(2)
