"""A worker that starts and never dials the scheduler, whatever its arguments."""

import time

if __name__ == "__main__":
    time.sleep(60)
