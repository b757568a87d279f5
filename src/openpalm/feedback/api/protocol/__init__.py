"""How every operation is called: tokens and rights, fields of requests, errors."""
