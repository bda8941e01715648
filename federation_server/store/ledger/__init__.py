"""The ledger of commands: what was ordered, and what has become of it.

    commands     what a command is, and reading one; `listing` reads many, by filter and page
    issuing      putting commands in; `batches` for many at once, let go by and by
    dispatch     taking what is to be sent to sessions; `leases` for neurons that call
    changes      the one way in which anything changes afterwards; `timers` are one of its users
    following    what is new of a command, for those who watch it
    situation    what `ExplainCommand` needs to know

Every change raises the command's `revision` and, where its state changes, leaves a row in
`command_transitions`.
"""
