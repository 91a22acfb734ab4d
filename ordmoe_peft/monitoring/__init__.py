"""What is watched while a model runs or trains: its routers' statistics, and signs that training fails."""
