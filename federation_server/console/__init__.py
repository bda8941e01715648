"""The admin's command line: a gRPC client like any other.

One module a noun (`neurons`, `commands`, `metrics`, …) over `leaf` (what every command shares),
`client` (channel, credential, calls), `problem` (what an error says), `values` (what people type)
and `render`/`wording` (what people read). It knows the contract and nothing of the server.
"""
