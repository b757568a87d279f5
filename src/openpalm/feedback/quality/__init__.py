"""Agreement, time, consensus and the board, computed by the worker and stored."""
