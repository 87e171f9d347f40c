"""Secure sums: the server learns the sum of the clients' numbers and no single client's.

Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning",
doi 10.1145/3133956.3133982, Figure 4, on a complete graph. Every pair of clients shares a mask
that one adds and the other subtracts, and every client adds one more of its own. In the sum, the
masks of pairs cancel. What is left over, own masks and those of pairs with a client that never
answered, is rebuilt from shares that the others hold.

Adversary: a server that reads everything, and up to c clients that tell it what they know. It may
lie about who is there and who answered, and tell different clients different things. As long as
`2 * threshold > num_clients + c` among the clients that are told of each other, it cannot open two
sums with the same client: whoever answers gives one kind of share per client, and both kinds
together would need more answers than there are. A sum holds the changes of as many clients as each
of them asks for (`smallest`), at least. The server, or one client with a wrong share, can make a
round fail.

Differs from the paper: no extra step in which clients compare whom the server named, because the
threshold is more than two thirds; a seal on the own mask's key, so that a wrong share is noticed.

Files: `ring` (numbers), `noised` (numbers with noise), `shamir` (shares), `masks` (keys and masks),
`member` (a client's half of a round), `opening` (the server's half). They know nothing about
adapters, messages or disks, and every cipher is the library cryptography's. `ckks` is another way,
with another and weaker adversary: homomorphic encryption under one key of all clients.
"""
