"""From files to encoded rows: sources, records, chat templates, operations, ledger."""
