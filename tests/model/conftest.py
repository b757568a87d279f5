import sys
from pathlib import Path

# Under --import-mode=importlib nothing else lets tests import what they share.
sys.path.insert(0, str(Path(__file__).parent))
