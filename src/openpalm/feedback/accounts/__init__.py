"""Who may do what: sign in, roles, invitations, API tokens, the audit log."""
