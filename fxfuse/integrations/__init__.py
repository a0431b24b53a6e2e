"""What other libraries call us through. Each module here imports its library, and nothing imports these modules."""
