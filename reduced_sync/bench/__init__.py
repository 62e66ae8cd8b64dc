"""What training and decoding cost: candidates in processes of their own, their times, and a cost model."""
