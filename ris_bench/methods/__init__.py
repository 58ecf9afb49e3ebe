"""Parameter-efficient tuning methods: one file is one row of the table."""
