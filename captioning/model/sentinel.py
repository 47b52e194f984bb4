"""Attention that knows when not to look: the visual sentinel (Lu et al. 2017).

python train.py --attention adaptive
"""

import torch
from torch import nn

from captioning.model.grid import context_vector


class VisualSentinel(nn.Module):
    """One more place of attention's softmax, which holds what the decoder knows without looking.

    The cell reads word and mean feature first, then attention looks, asked by the new state (Lu et
    al. 2017, eqs. 6 to 13). Places are scored by the suite's own attention network, and a GRU's
    state stands for the memory that it does not have.
    """

    def __init__(self, encoder_dim, attention_dim, embed_dim, decoder_dim):
        super().__init__()
        self.gate_x = nn.Linear(embed_dim + encoder_dim, decoder_dim)
        self.gate_h = nn.Linear(decoder_dim, decoder_dim, bias=False)
        self.sentinel_att = nn.Linear(decoder_dim, attention_dim, bias=False)
        self.image = nn.Linear(encoder_dim, decoder_dim, bias=False)

    def forward(self, decoder, embedded, state, context):
        """A step of ``DecoderWithAttention`` after the word has been embedded.

        :param embedded: float (B, R, embed_dim)
        :return: (scores, attention, state) as of ``step``; alpha is (B, R, num_pixels + 1), and the
            sentinel's weight its last
        """
        mean = context.mean.unsqueeze(1).expand(-1, embedded.shape[1], -1)  # (B, R, encoder_dim)
        x = torch.cat([embedded.to(mean.dtype), mean], dim=2)  # (B, R, embed_dim + encoder_dim)
        gate = torch.sigmoid(self.gate_x(x) + self.gate_h(state[0]))  # eq. 9
        state = decoder.recur(x, state)
        # c of an LSTM, h of a GRU; what stands behind (h, c) belongs to other layers
        sentinel = gate * state[min(1, len(state) - 1)].tanh()  # eq. 10, (B, R, decoder_dim)
        query, network = decoder.query(state[0], embedded), decoder.attention
        own = network.decoder_att(query) + self.sentinel_att(sentinel)  # (B, R, attention_dim)
        energies = [network(context.encoder_att, query), network.full_att(own.relu())]
        attention = decoder.attend(torch.cat(energies, dim=2), decoder)  # eq. 12
        z = context_vector(attention.weights[..., :-1], context)  # (B, R, encoder_dim)
        seen = self.image(z) + attention.weights[..., -1:] * sentinel  # eq. 11
        return decoder.score(state[0] + seen, embedded, z), attention, state
