"""What `compare` does beside running arms: tests between them, their budgets, scale sweeps, arms in processes of their own."""
